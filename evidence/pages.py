"""The pages that show results: tables and pictures made anew from the records, and records brought together.

In README.md and results/*.md a table stands between two comments, the first of which is the command that prints it:

    <!-- python -m evidence copytask --short -->
    <!-- end -->

and a picture follows the comment with the command that draws it, `python -m evidence.pictures ... -o results/NAME.png`.
"""

import itertools
import json
import os
import re
import shlex
from pathlib import Path

from common.errors import UserError
from common.runs.records import RECORDS, read_config, read_record, write_atomically
from evidence import pictures, table
from evidence.launch import is_left
from evidence.rows import records_below

TABLE = re.compile(r"(<!-- python -m evidence (.+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
PICTURE = re.compile(r"<!-- python -m evidence\.pictures (.+?) -->")
ABSOLUTE = re.compile(r'(?<=["=])(?:[A-Za-z]:)?[/\\]+[^"/\\][^"]*[/\\]')  # in JSON: the folders of a machine, no result


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "results").glob("*.md"))]


def fill(text: str) -> str:
    """`text` with every table as its command prints it now. Runs are looked for from the current folder."""
    def printed(found: re.Match) -> str:
        args = table.make_parser().parse_args(shlex.split(found[2]))
        return f"{found[1]}\n{table.text_of(args)}\n{found[3]}"

    return TABLE.sub(printed, text)


def update(root: Path) -> None:
    """Write the tables and the pictures of all pages anew, after all tables have been made.

    Raises UserError where a table would show fewer runs than it does, because records are missing.
    """
    if not (root / "README.md").exists():
        raise UserError("there is no README.md here; update in the project's folder, where README.md and results/ are")
    old = {page: page.read_text(encoding="utf-8") for page in pages(root)}
    new = {page: fill(text) for page, text in old.items()}
    for page in old:
        for before, after in zip(TABLE.finditer(old[page]), TABLE.finditer(new[page]), strict=True):
            if after[0].count("n = ") < before[0].count("n = "):
                raise UserError(f"{page}: the records hold fewer runs than the table of python -m evidence {before[2]} "
                                "shows; bring them back, or delete the lines of the table to make it anew")
    for page, text in new.items():
        if text != old[page]:
            write_atomically(page, text.encode(), "then update again")
        print(f"{page}: {len(TABLE.findall(text))} tables{'' if text == old[page] else ', changed'}")
    for text in new.values():
        for command in PICTURE.findall(text):
            pictures.main(shlex.split(command))


def place_for(folder: Path, config: dict, target: Path) -> Path:
    """The folder of `target` that holds this run's record, or a new one: names may be taken by other runs."""
    names = (folder.name if number == 1 else f"{folder.name}-{number}" for number in itertools.count(1))
    return next(place for place in (target / config["script"] / name for name in names)
                if not os.path.lexists(place / "config.json") or
                all(read_config(place).get(key) == config.get(key) for key in ("run", "started", "argv")))


def collect(sources: list[Path], target: Path) -> None:
    """Copy the records (not the checkpoints) of the runs below `sources` that have ended or diverged."""
    counts = {"new": 0, "newer": 0, "the same": 0, "not finished, left out": 0}
    runs = {source: records_below(source) for source in sources}
    if empty := [str(source) for source, found in runs.items() if not found]:
        raise UserError(f"{', '.join(empty)}: no runs; name a folder with SCRIPT/RUN/config.json below it")
    for folder, _ in itertools.chain(*runs.values()):
        if is_left(folder):
            counts["not finished, left out"] += 1
            continue
        records = {name: ABSOLUTE.sub("", text) for name in RECORDS if (text := read_record(folder, name)) is not None}
        place = place_for(folder, json.loads(records["config.json"]), target)
        before = {name: text for name in RECORDS if (text := read_record(place, name)) is not None}
        counts["the same" if before == records else "newer" if before else "new"] += 1
        if before != records:
            place.mkdir(parents=True, exist_ok=True)
            for name, text in records.items():
                write_atomically(place / name, text.encode(), "then collect again")
    print(", ".join(f"{count} {what}" for what, count in counts.items() if count))
