"""Sessions: a script's `main` in a forked process, on tiny data; and what makes two runs the same.

A run is made of sessions: the first starts it, each of the others resumes it. torch and the scripts are imported
once, here, and every session is a fork of this process: that costs milliseconds in place of seconds, so that a run
can be killed hundreds of times. Nothing in the project is changed but in the forked process.
"""

import contextlib
import csv
import importlib
import io
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # imported by every optimizer, in a second: once here rather than in each session

from common.data import PixelSequences
from common.errors import start
from common.recurrence import native_engine
from common.runs import run
from evidence import pictures

# A task's script and the arguments of its tiny run: another cell, stair and optimizer each, every report a checkpoint.
TASKS = {
    "copytask": ("copytask_nvar", ("--net-type", "nnRNN", "--nhid", "6", "--T", "6", "--c-length", "2", "--batch", "3",
                                   "--vari", "--updates", "4", "--log-interval", "1")),
    "sMNIST": ("sMNIST_alpha", ("--net-type", "expRNN", "--nhid", "5", "--batch", "12", "--epochs", "2",
                                "--log-interval", "1", "--clip", "1")),
    "language": ("language_expalpha", ("--net-type", "RNN", "--optimizer", "Adam", "--nhid", "5", "--emsize", "3",
                                       "--batch", "4", "--bptt", "40", "--epochs", "2", "--log-interval", "1")),
}
FILES = {"config.json", "log.csv", "last.pt", "best.pt", "curves.png", "result.json", ".lock"}
CLOCK = {"seconds", "command", "commit", "device", "versions"}     # of result.json: what may differ


# ── tiny data ────────────────────────────────────────────────────────────────────────────────────────────


def tiny_images(*_) -> tuple:
    """24 training, 7 validation and 9 test images of 15 random pixels, in the place of MNIST."""
    generator = torch.Generator().manual_seed(0)
    return tuple(PixelSequences(torch.randint(0, 256, (count, 15), generator=generator, dtype=torch.uint8),
                                torch.randint(0, 10, (count,), generator=generator)) for count in (24, 7, 9))


def write_tiny_text(folder: Path) -> None:
    """Three character files of a few random words."""
    generator = random.Random(0)
    (folder / "pennchar").mkdir(parents=True)
    for part, words in (("train", 90), ("valid", 30), ("test", 30)):
        lines = [" ".join(generator.choices("abcde_", k=8)) for _ in range(words // 2)]
        (folder / "pennchar" / f"{part}.txt").write_text("".join(f" {line} \n" for line in ["a b c d e _", *lines]))


class Workplace:
    """A temporary folder with the tiny data, in which runs are made; and the process made ready to be forked."""

    def __init__(self):
        torch.set_num_threads(1)  # before anything is computed: threads do not survive a fork
        for script, _ in TASKS.values():
            importlib.import_module(script)
        native_engine.serves(torch.zeros(1))
        self.folder = Path(tempfile.mkdtemp(prefix="stair-robustness-"))
        write_tiny_text(self.folder / "data")
        pictures.draw_stairs(self.folder / "warm.png")
        self.made = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_folder(self) -> Path:
        """An empty folder, for one run."""
        self.made += 1
        folder = self.folder / f"{self.made:05d}"
        folder.mkdir()
        return folder

    def arguments(self, task: str) -> list[str]:
        _, arguments = TASKS[task]
        data = ["--data", str(self.folder / "data")] if task == "language" else []
        return [*arguments, "--threads", "1", *data, "--save", "saves"]


# ── one session ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Outcome:
    """How a session ended: exit status (−n for signal n), what it said, how long it took."""

    status: int
    out: str
    err: str
    seconds: float

    def sentence(self) -> str | None:
        """The one line on stderr with which it ended, or None if there was another number of lines."""
        lines = self.err.splitlines()
        return lines[0] if len(lines) == 1 else None


class Session:
    """A script's `main` in a forked process, in the folder `place`.

    `prepare` is called in the forked process before `main`.
    """

    def __init__(self, place: Path, script: str, arguments, prepare=None):
        self.place, self.started = place, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                status = self._child(script, [*map(str, arguments)], prepare)
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                with contextlib.suppress(OSError):
                    traceback.print_exc()
                    sys.stderr.flush()
            finally:
                os._exit(status)  # nothing of the process that was forked is to be ended here

    def _child(self, script, arguments, prepare) -> int:
        os.chdir(self.place)
        for number, name in ((1, "out.txt"), (2, "err.txt")):
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):  # which nohup would have the session ignore
            signal.signal(number, signal.SIG_DFL)
        module = sys.modules[script]
        if hasattr(module, "load_mnist"):
            module.load_mnist = tiny_images
        run.AUTOSAVE_SECONDS = 0
        run.git_commit = lambda: None  # a process more, for nothing that is looked at here
        sys.argv = [f"{script}.py", *arguments]
        if prepare is not None:
            prepare()
        try:
            start(module.main)
        except SystemExit as stop:
            return stop.code or 0
        return 0

    def signal_after(self, seconds: float, number: int) -> None:
        """Send a signal when `seconds` of the session are over, unless it ends before."""
        descriptor = os.pidfd_open(self.pid)
        if not select.select([descriptor], [], [], max(0.0, self.started + seconds - time.monotonic()))[0]:
            signal.pidfd_send_signal(descriptor, number)
        os.close(descriptor)

    def wait(self, limit: float = 120) -> Outcome:
        self.signal_after(limit, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        texts = [path.read_text(encoding="utf-8") if path.exists() else ""
                 for path in (self.place / "out.txt", self.place / "err.txt")]
        return Outcome(status, *texts, time.monotonic() - self.started)


def run_folder(place: Path) -> Path | None:
    """The one run below `place`, if it has come so far as to have a config.json."""
    found = [path.parent for path in place.glob("saves/*/*/config.json")]
    return found[0] if found else None


def go_on(workplace: Workplace, place: Path, task: str) -> list[str]:
    """The arguments of the next session: resume the run in `place`, or start it again if it never began."""
    if folder := run_folder(place):
        return ["--resume", str(folder)]
    shutil.rmtree(place / "saves", ignore_errors=True)
    return workplace.arguments(task)


# ── the same run ─────────────────────────────────────────────────────────────────────────────────────────


def flat(value, path: str = "") -> dict:
    """A nest of dicts, lists and tensors as {path: bytes or number}."""
    if torch.is_tensor(value):
        return {path: (str(value.dtype), tuple(value.shape), value.cpu().numpy().tobytes())}
    if not isinstance(value, (dict, list, tuple)):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: leaf for key, part in pairs for place, leaf in flat(part, f"{path}/{key}").items()}


def log_rows(content: bytes) -> list[dict]:
    """The rows of a log.csv without the clock."""
    rows = csv.DictReader(io.StringIO(content.decode()))
    return [{column: cell for column, cell in row.items() if column != "seconds"} for row in rows]


def tensors(path: Path) -> dict:
    """The flat content of a .pt file, without what the clock decides (the length of the log holds its digits)."""
    content = torch.load(path, weights_only=True, map_location="cpu")
    return {name: leaf for name, leaf in flat(content).items() if name not in ("/seconds", "/log_size")}


def state_of(folder: Path) -> dict:
    """All that a finished run is, but for the clock."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {"weights, optimizer, generators": tensors(folder / "last.pt"), "best weights": tensors(folder / "best.pt"),
            "log": log_rows((folder / "log.csv").read_bytes()), "picture": (folder / "curves.png").stat().st_size > 999,
            "result": {name: value for name, value in result.items() if name not in CLOCK},
            "files": {path.name for path in folder.iterdir()} == FILES}


def differences(folder: Path | None, expected: dict) -> list[str]:
    """In what a finished run differs from the uninterrupted one; empty if it is the same, bit for bit."""
    if folder is None:
        return ["there is no run"]
    try:
        found = state_of(folder)
    except (OSError, ValueError, RuntimeError) as error:
        return [f"{type(error).__name__}: {error}"]
    return [name for name in expected if found[name] != expected[name]]


def damage(folder: Path | None, expected: dict) -> list[str]:
    """What is wrong in the folder of a run that was disturbed: every file whole, the log's good part a true one."""
    wrong = []
    if folder is None:
        return wrong
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            try:
                torch.load(folder / name, weights_only=True, map_location="cpu")
            except Exception as error:
                wrong.append(f"{name}: {error}")
    for name in ("config.json", "result.json"):
        if (folder / name).exists():
            try:
                json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                wrong.append(f"{name}: {error}")
    if not wrong and (folder / "last.pt").exists():
        size = torch.load(folder / "last.pt", weights_only=True, map_location="cpu")["log_size"]
        content = (folder / "log.csv").read_bytes() if size else b""
        rows = log_rows(content[:size])
        if len(content) < size or rows != expected["log"][:len(rows)]:
            wrong.append("log.csv is not what the checkpoint counts on")
    return wrong


def uninterrupted(workplace: Workplace, task: str) -> tuple[dict, float]:
    """The run that all others are compared with: its state and its seconds."""
    place = workplace.new_folder()
    outcome = Session(place, TASKS[task][0], workplace.arguments(task)).wait()
    if outcome.status != 0 or outcome.err:
        raise RuntimeError(f"the tiny run of {task} does not work: {outcome.err}")
    return state_of(run_folder(place)), outcome.seconds


def name_of(path) -> str:
    """A file's name without what makes a temporary one unique."""
    return re.sub(r"^\.(.+?)(\.\d+)?\.tmp$", r"\1", Path(path).name)
