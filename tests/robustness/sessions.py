"""Sessions: a script's `main` in a forked process; the moments at which to disturb one; what makes two runs the same.

A run is made of sessions: the first starts it, each of the others resumes it. A session is a fork of this process, in
which torch and the scripts are imported: it costs milliseconds. Only the forked process is ever tampered with.
"""

import builtins
import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from common.data import PixelSequences
from common.errors import run_main
from tests.conftest import write_penn

# Another cell, stair and optimizer for each task. Every update or epoch is a report.
TINY = " --log-interval 1 --threads 1 --save saves"
SCRIPTS = {
    "copytask_nvar": "--net-type nnRNN --nhid 6 --T 6 --c-length 2 --batch 3 --vari --updates 4" + TINY,
    "sMNIST_alpha": "--net-type expRNN --nhid 5 --batch 12 --epochs 2 --clip 1" + TINY,
    "language_expalpha": "--net-type RNN --optimizer Adam --nhid 5 --batch 4 --bptt 120 --epochs 2" + TINY,
}
# What the clock, the machine and the way of starting decide. The length of the log holds the digits of the seconds.
CLOCK = {"run", "resume", "seconds", "log_size", "started", "argv", "command", "commit", "device", "versions"}


def tiny_images(*_) -> tuple:
    """24 training, 7 validation and 9 test images of 15 random pixels, in the place of MNIST."""
    generator = torch.Generator().manual_seed(0)
    return tuple(PixelSequences(torch.randint(0, 256, (count, 15), generator=generator, dtype=torch.uint8),
                                torch.randint(0, 10, (count,), generator=generator)) for count in (24, 7, 9))


@contextlib.contextmanager
def workplace():
    """A temporary folder for the tiny data and all runs; and this process made ready to be forked."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch's threads for a GPU would not survive a fork,
    torch.set_num_threads(1)                 # nor those of a CPU
    with tempfile.TemporaryDirectory(prefix="stair-robustness-") as folder:
        tempfile.tempdir = folder
        write_penn(Path(folder) / "data")
        SCRIPTS["language_expalpha"] += f" --data {folder}/data"
        for script in SCRIPTS:
            importlib.import_module(script)
        with contextlib.redirect_stdout(io.StringIO()):  # a run in this process loads all that a session needs
            sys.modules["copytask_nvar"].main([*SCRIPTS["copytask_nvar"].split(), "--save", f"{folder}/warm"])
        yield
    tempfile.tempdir = None


class Outcome(NamedTuple):
    """How a session ended: exit status (−n for signal n), what it said, how long it took."""
    status: int
    out: str
    err: str
    seconds: float


def session(place: Path, script: str, typed: list[str], inside=None, sent: tuple[float, int] | None = None) -> Outcome:
    """Run a script's `main` in a forked process, in the folder `place`, to its end.

    `inside` is called in that process before `main`. `sent` is a signal: after how many seconds, which one.
    What the session says goes through pipes, so that a limit on files does not meet it.
    """
    started, pipes = time.perf_counter(), (os.pipe(), os.pipe())
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = _child(place, script, typed, inside, [writing for _, writing in pipes])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # nothing of the process that was forked is to be ended here
    process, (seconds, number) = os.pidfd_open(pid), sent or (3600, signal.SIGKILL)
    if not select.select([process], [], [], max(0.0, started + seconds - time.perf_counter()))[0]:
        signal.pidfd_send_signal(process, number)
    os.close(process)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for reading, writing in pipes:
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            texts.append(pipe.read())
    return Outcome(status, *texts, time.perf_counter() - started)


def _child(place: Path, script: str, typed: list[str], inside, outputs: list[int]) -> int:
    os.chdir(place)
    for number, descriptor in enumerate(outputs, 1):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (open(n, "w", 1, encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
    time.monotonic = itertools.count(0, 100).__next__  # the clock runs fast: every chance to save is taken
    os.environ["PATH"] = ""                            # no git, which is a process more
    sys.modules["sMNIST_alpha"].load_mnist = tiny_images
    sys.argv = [f"{script}.py", *typed]
    if inside is not None:
        inside()
    try:
        run_main(sys.modules[script].main)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run_folder(place: Path) -> Path | None:
    """The one run below `place`, if it has come so far as to have a config.json."""
    return next((path.parent for path in place.glob("saves/*/*/config.json")), None)


def watch(act, at: int | None = None) -> None:
    """Call `act(name)` at moment number `at` (from 1) of this process, or at every moment.

    A file is opened, half written, written, flushed to the disk, renamed, cut; a folder is made: before and after each
    of these is a moment. The hooks are in `open` and `os`, so they meet every write of a run, whoever makes it.
    """
    count, plain_open = itertools.count(1), builtins.open

    def reach(name: str) -> None:
        if at in (None, next(count)):
            act(name)

    def name_of(path) -> str:  # without what makes the name of a temporary file unique
        return re.sub(r"^\.(.+?)(\.\d+)?\.tmp$", r"\1", Path(path).name)

    def hook(function: str, verb: str, label) -> None:
        original = getattr(os, function)

        def called(*given, **named):
            name = label(*given)
            reach(f"{name}: {verb}, before")
            result = original(*given, **named)
            reach(f"{name}: {verb}, after")
            return result

        setattr(os, function, called)

    def opened(path, mode="r", *given, **named):
        if "r" in mode or "saves" not in str(path):
            return plain_open(path, mode, *given, **named)
        name = name_of(path)
        reach(f"{name}: open, before")
        file = plain_open(path, mode, *given, **named)
        reach(f"{name}: open, after")
        file.write = partial(write_in_halves, file, file.write, name)
        return file

    def write_in_halves(file, write, name, content):
        half = len(content) // 2
        for part, moment in ((content[:half], "half written"), (content[half:], "written")):
            write(part)
            file.flush()
            reach(f"{name}: {moment}")
        return len(content)

    builtins.open = io.open = opened
    hook("fsync", "flush to the disk", lambda descriptor: name_of(os.readlink(f"/proc/self/fd/{descriptor}")))
    hook("replace", "rename", lambda source, target: name_of(target))
    hook("truncate", "cut", lambda descriptor, size: name_of(os.readlink(f"/proc/self/fd/{descriptor}")))
    hook("mkdir", "make", lambda path, *mode: "folder")


def at_updates(wanted, act) -> None:
    """Call `act(number)` after the optimizer steps of these numbers (from 1) of this process."""
    count = itertools.count(1)

    def stepped(*_):
        if (number := next(count)) in wanted:
            act(number)

    register_optimizer_step_post_hook(stepped)


def flat(value, path: str = "") -> dict:
    """A nest of dicts, lists and tensors as {path: bytes or number}, without what the clock decides."""
    if torch.is_tensor(value):
        return {path: (str(value.dtype), tuple(value.shape), value.cpu().numpy().tobytes())}
    if not isinstance(value, (dict, list, tuple)):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: leaf for key, part in pairs if key not in CLOCK
            for place, leaf in flat(part, f"{path}/{key}").items()}


def rows(table: bytes) -> list[dict]:
    return [{column: cell for column, cell in row.items() if column not in CLOCK}
            for row in csv.DictReader(io.StringIO(table.decode()))]


checkpoint = partial(torch.load, weights_only=True, map_location="cpu")
READERS = {".pt": lambda path: flat(checkpoint(path)), ".json": lambda path: flat(json.loads(path.read_bytes())),
           ".csv": lambda path: rows(path.read_bytes())}


def state(folder: Path) -> dict:
    """{name of a file of the run: what it says}. Raises if a file is not whole."""
    return {path.name: READERS.get(path.suffix, Path.read_bytes)(path) for path in folder.iterdir()}


def fault(folder: Path | None, expected: dict, finished: bool) -> str:
    """What is wrong with a disturbed run, or "": a file is not whole, the log is not what the checkpoint counts on, or,
    where it is `finished`, a file is not as that of the uninterrupted run, bit for bit.
    """
    try:
        found = state(folder) if folder else {}
        size = checkpoint(folder / "last.pt")["log_size"] if "last.pt" in found else 0
    except Exception as error:  # of torch, json or csv
        return f"{type(error).__name__}: {error}"
    log = (folder / "log.csv").read_bytes() if size else b""
    counted = rows(log[:size])
    if len(log) < size or counted != expected["log.csv"][:len(counted)]:
        return "log.csv is not what the checkpoint counts on"
    differ = [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
    return f"{', '.join(differ)} is not as in the uninterrupted run" if differ and finished else ""
