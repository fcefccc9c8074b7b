"""How a script ends: a mistake of a person is a `UserError`, which `start` prints as one sentence without a traceback.

`when_asked_to_stop` handles signals. `nearest` finds what a misspelled name may have meant.
"""

import contextlib
import difflib
import os
import signal
import sys
from pathlib import Path

# What torch's allocators, the driver and the GPU's libraries say when memory is used up. "an illegal memory access" is
# a bug and not among them.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class UserError(Exception):
    """A mistake of the person at the keyboard: one sentence with the value and the way out."""

    def __init__(self, sentence: str, status: int = 2):
        super().__init__(sentence)
        self.status = status


def nearest(text: str, names, cutoff: float = 0.4, most: int = 1) -> list[str]:
    """The names that `text` may have meant, best first; upper and lower case count as the same."""
    lower = {name.lower(): name for name in names}
    return [lower[near] for near in difflib.get_close_matches(text.lower(), lower, n=most, cutoff=cutoff)]


@contextlib.contextmanager
def when_asked_to_stop(handler, *names: str):
    """Within this context the signals `names` call `handler(number, frame)`.

    An ignored signal stays ignored, as nohup asks for. A name that the system does not know is left out.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, handler) for number in numbers
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def start(main) -> None:
    """Run a script's `main`: a UserError is printed as one sentence, and its status is the exit status."""
    open_streams()
    for stream in (sys.stdout, sys.stderr):  # an output without Greek letters shows their numbers
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")
    try:
        _to_its_last_line(main)
    except UserError as error:
        sentence, status = str(error), error.status
    except KeyboardInterrupt:
        sentence, status = "stopped", 130
    except BrokenPipeError:  # the program that read the output, perhaps `head`, has ended
        close_output()
        sys.exit(1)
    except OSError as error:  # /dev/full as output, a disk that was pulled out
        close_output()
        sentence, status = f"{error.filename or 'the output'}: {error.strerror or error}", 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in OUT_OF_MEMORY):
            raise
        sentence, status = "this does not fit into memory; choose a smaller --nhid, --batch or sequence length", 1
    else:
        return
    if status > 128:  # a scheduler that repeats its signal changes nothing of how this process ends
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"{Path(sys.argv[0]).name}: {printable(sentence)}", file=sys.stderr)  # one line, whatever was typed
    sys.exit(status)


def _to_its_last_line(main) -> None:
    """Run `main` and flush its output, so that an error of the output is found here and not when Python exits."""
    try:
        main()
    except SystemExit:  # of --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def printable(text: str, keep: str = "") -> str:
    """`text` with a number in the place of every unprintable character, except those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def open_streams() -> None:
    """Open closed standard streams on the null device, so that no file of a run takes their place."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None or getattr(sys, name).closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as Python runs)


def close_output() -> None:
    """Discard what is still to be printed, so that Python does not fail on it again when it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
