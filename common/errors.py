"""How a script ends: `run_main` prints a mistake of a person, a `UserError`, as one sentence without a traceback.

`when_asked_to_stop` handles signals. `nearest` finds what a misspelled name may have meant.
"""

import contextlib
import difflib
import os
import re
import signal
import sys
import threading
from pathlib import Path

# What torch's allocators, the driver and the GPU's libraries say when memory is used up. "an illegal memory access" is
# a bug and not among them.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
STREAMS = ("stdin", "stdout", "stderr")
TERMINAL_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f]")


class UserError(Exception):
    """A mistake of the person at the keyboard: one sentence with the value and the way out."""

    def __init__(self, sentence: str, status: int = 2):
        super().__init__(sentence)
        self.status = status


def nearest(text: str, names, cutoff: float = 0.4, most: int = 1) -> list[str]:
    """The names that `text` may have meant, best first; upper and lower case count as the same."""
    lower = {name.lower(): name for name in names}
    return [lower[near] for near in difflib.get_close_matches(text.lower(), lower, n=most, cutoff=cutoff)]


def printable(text: str, keep: str = "") -> str:
    """`text` with an escape in the place of every character that controls a terminal, except those in `keep`."""
    return TERMINAL_CONTROLS.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


@contextlib.contextmanager
def when_asked_to_stop(handler, *names: str):
    """Within this context the signals `names` call `handler(number, frame)`; in the main thread, as Python has it.

    An ignored signal stays ignored, as nohup asks for. A name that the system does not know is left out.
    """
    is_main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if is_main and hasattr(signal, name)]
    before = {number: signal.signal(number, handler) for number in numbers
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def run_main(main) -> None:
    """Run a script's `main`: a UserError is printed as one sentence, and its status is the exit status."""
    for name in STREAMS:
        if getattr(sys, name) is None:  # it was closed when Python started
            discard(name)
    for stream in (sys.stdout, sys.stderr):  # an output without Greek letters shows their numbers
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # an error of the output is found here and not when Python exits
        return
    except UserError as error:
        sentence, status = str(error), error.status
    except KeyboardInterrupt:
        sentence, status = "stopped", 130
    except ModuleNotFoundError as error:
        sentence, status = f"the package {error.name} is missing; pip install -r requirements.txt", 1
    except OSError as error:  # /dev/full as output, a disk that was pulled out
        discard("stdout")
        sentence, status = f"{error.filename or 'the output'}: {error.strerror or error}", 1
        if isinstance(error, BrokenPipeError):  # the program that read the output, perhaps `head`, has ended
            sys.exit(status)
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY)
        if not is_full and "CUDA error" not in str(error):
            raise
        sentence, status = "this does not fit into memory; choose a smaller --nhid, --batch or sequence length", 1
        if not is_full:
            sentence = f"the GPU stopped with '{str(error).splitlines()[0]}'; the run's folder keeps its last good " \
                       "state: go on with --resume and the folder, and with --engine torch if it happens again"
    module = getattr(sys.modules["__main__"], "__spec__", None)
    typed = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"{typed}: {printable(sentence)}", file=sys.stderr)  # one line, whatever was typed
    sys.exit(status)


def discard(name: str) -> None:
    """Let a standard stream lead to the null device: nothing printed fails, and no file of a run takes its number."""
    number = STREAMS.index(name)
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
