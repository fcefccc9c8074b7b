"""What a flag accepts: functions from text to a value. Each raises ArgumentTypeError, which says what is wanted."""

import math
import os
from argparse import ArgumentTypeError
from pathlib import Path

from common.errors import nearest


def one_of(*names, aliases=None):
    """A name of a list; the nearest one is suggested for a misspelled one."""
    def convert(text):
        name = (aliases or {}).get(text, text)
        if name in names:
            return name
        hint = "".join(f"; did you mean {near}?" for near in nearest(text, names))
        raise ArgumentTypeError(f"'{text}' is not one of {', '.join(names)}{hint}")

    convert.metavar = "{" + ",".join(names) + "}"
    return convert


def number(kind, low=-math.inf, high=math.inf, open_low=False, open_high=False):
    """An int or float within bounds; not-a-number and infinity are out of every bound."""
    want = "a whole number" if kind is int else "a number"
    if (low, high) != (-math.inf, math.inf):
        want += f" in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        if not inside or not math.isfinite(value):
            raise ArgumentTypeError(f"'{text}' is not {want}")
        return value

    return convert


def some_text(text):
    """Any text but an empty one, which is most likely a variable of the shell that was never set."""
    if not text:
        raise ArgumentTypeError("'' is no text")
    return text


def name_part(text):
    """A piece of a folder's name: what every file system and every terminal takes."""
    if not text or text.startswith(".") or any(c in text for c in "/\\") or not text.isprintable() \
            or len(text.encode()) > 100:
        raise ArgumentTypeError(f"'{text}' cannot be part of a folder's name; use at most 100 letters, digits, - and _")
    return text


def path_of(what, absolute=False):
    """The path of a file or folder; an `absolute` one is found from another folder too, where a run goes on."""
    def convert(text):
        if not text or not text.isprintable():
            raise ArgumentTypeError(f"{text!r} is not the name of a {what}")
        path = Path(os.path.expanduser(text))  # a shell leaves --save=~/runs as it is
        return path.absolute() if absolute else path
    return convert


def switch(text):
    """True or False in a script or in config.json; on the command line --x or --no-x."""
    if text not in ("True", "False"):
        raise ArgumentTypeError("is neither True nor False")
    return text == "True"
