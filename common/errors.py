"""How a script ends: a person's mistake is a `UserError`, one sentence; `start` prints it, never a traceback.

Signals are taken in one place, `when_asked_to_stop`; what was nearly typed is found in one, `nearest`.
"""

import contextlib
import difflib
import os
import signal
import sys
from pathlib import Path

# What torch's allocators, the driver and the GPU's libraries say when memory is used up. "an illegal memory access" is
# none of it: that is a mistake of a program.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class UserError(Exception):
    """A mistake of the person at the keyboard: one sentence with the value and the way out."""

    def __init__(self, sentence: str, status: int = 2):
        super().__init__(sentence)
        self.status = status


def nearest(text: str, names, cutoff: float = 0.4, most: int = 1) -> list[str]:
    """The names that `text` may have meant, best first, whatever their case."""
    lower = {name.lower(): name for name in names}
    return [lower[near] for near in difflib.get_close_matches(text.lower(), lower, n=most, cutoff=cutoff)]


@contextlib.contextmanager
def when_asked_to_stop(handler, *names: str):
    """Ctrl-C, a scheduler and a closed terminal, by the `names` of their signals, call `handler(number, frame)`.

    A signal that is ignored, which is what nohup asks for, stays so; one that the system does not know is left out.
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
    for stream in (sys.stdout, sys.stderr):  # an output that knows no Greek shows their numbers instead
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sentence, status = str(error), error.status
    except KeyboardInterrupt:
        sentence, status = "stopped", 130
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has gone: there is nobody left to tell
        close_output()
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in OUT_OF_MEMORY):
            raise
        sentence, status = "this does not fit into memory; choose a smaller --nhid, --batch or sequence length", 1
    else:
        return
    sentence = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)  # one line, whatever was typed
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(status)


def close_output() -> None:
    """Send what is still to be printed nowhere, so that Python does not fail on it once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
