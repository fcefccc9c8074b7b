"""Troubles: kills, signals, disks and folders that fail, a second process, damaged files, another machine.

Each ends in one sentence, or works. Nothing that was already saved is harmed: the disturbed run goes on, once the
trouble is over, and ends bit for bit as the uninterrupted one.
"""

import ctypes
import errno
import os
import random
import re
import resource
import shutil
import signal
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from tests.robustness.sessions import SCRIPTS, at_updates, fault, run_folder, session, state, watch


class Tally:
    """A line of the page: what was tried, how often, how it ended."""

    def __init__(self, what: str):
        self.what, self.disturbed, self.texts, self.wrong = what, 0, set(), []
        self.cases, self.tried = Counter(), Counter()

    def judge(self, where: str, problem: str) -> None:
        self.tried[where] += 1
        if problem:
            self.wrong.append(f"{self.what}; {where}: {' '.join(problem.split())}")

    def __str__(self) -> str:
        tried, texts = self.tried.total(), "; ".join(f"“{text}”" for text in sorted(self.texts))
        return f"| {self.what} | {self.disturbed} | {tried} | {tried - len(self.wrong)} | {texts} |"


class Task:
    """The tiny run of a script, once undisturbed and once killed; all its disturbed runs are compared with these.

    Of the cases of a trouble each `every`-th is tried, and noted in `tally`.
    """

    def __init__(self, script: str, every: int):
        self.script, self.every, self.tally = script, every, Tally("")
        self.auto = []  # ["--resume", "auto"] where each session is the same command
        whole, self.cut, resumed = (Path(tempfile.mkdtemp()) for _ in range(3))
        self.starts, self.seconds = self._moments(whole)   # of a session that starts a run
        self.state = state(run_folder(whole))
        self.largest = max(path.stat().st_size for path in run_folder(whole).iterdir())
        if unseen := {name for name in self.state if f"{name}: open, after" not in self.starts}:
            raise RuntimeError(f"{script} writes {unseen} in a way that has no moments")
        # Killed after its third row and before the checkpoint that counts on it, so that resuming cuts the log.
        third = [number for number, moment in enumerate(self.starts, 1) if moment == "log.csv: written"][2]
        session(self.cut, script, SCRIPTS[script].split(), partial(watch, kill, third))
        shutil.copytree(self.cut, resumed, dirs_exist_ok=True)
        self.resumes, _ = self._moments(resumed)           # of a session that resumes `cut`

    def _moments(self, place: Path) -> tuple[list[str], float]:
        outcome = session(place, self.script, self._go_on(place), partial(watch, partial(print, "moment")))
        if outcome.status or outcome.err:
            raise RuntimeError(f"the tiny run of {self.script} does not work: {outcome}")
        return re.findall("^moment (.*)$", outcome.out, re.MULTILINE), outcome.seconds

    def _go_on(self, place: Path) -> list[str]:
        """The arguments of the next session: those of the first one, or the folder of a run that has begun."""
        folder = None if self.auto else run_folder(place)
        return ["--resume", str(folder)] if folder else [*SCRIPTS[self.script].split(), *self.auto]

    def disturb(self, where: str, ends: dict[int, str], inside=None, sent=None, spoil=None, resumes: bool = False,
                sessions: int = 1, refused: bool = False) -> None:
        """Disturb a run and let it go on to its end.

        ends      how the session may end: {exit status: pattern of its sentence, or of what it prints with status 0}
        inside    called in the session before `main`; `spoil`: called before it, with the place
        sent      gives the (seconds, number) of a signal that comes from outside
        resumes   the session goes on with `cut`; otherwise it starts a run
        sessions  the most that are disturbed, one after the other, until one comes to its end; then one is let be
        refused   the session changes no byte of the place, and that is all
        """
        self.tally.cases[self.script] += 1
        if (self.tally.cases[self.script] - 1) % self.every:
            return
        place = Path(tempfile.mkdtemp())
        if resumes:
            shutil.copytree(self.cut, place, dirs_exist_ok=True)
        typed = self._go_on(place)
        if spoil:
            spoil(place)
        before = contents(place)
        while True:
            if not sessions:  # this one is let be
                ends, inside, sent = {0: ""}, None, None
            outcome = session(place, self.script, typed, inside, sent and sent())
            self.tally.disturbed += outcome.status != 0
            changed = contents(place) != before
            if (place / "moved").exists():  # the trouble is over
                (place / "moved").rename(place / "saves")
            for path in place.rglob("*"):
                path.chmod(0o755)
            text = re.search(ends.get(outcome.status, "$^"), outcome.err if outcome.status else outcome.out)
            if not text or outcome.err.count("\n") != (outcome.status > 0):
                problem = f"status {outcome.status}: {outcome.err[-300:]}"
            else:
                self.tally.texts |= {text.group()} - {""}
                problem = "the folder changed" if refused and changed else \
                    not refused and fault(run_folder(place), self.state, finished=not sessions)
            if problem or refused or not sessions:
                break
            sessions = sessions - 1 if outcome.status else 0
            typed = self._go_on(place)
        self.tally.judge(where, problem and f"{self.script}: {problem}")
        shutil.rmtree(place)


def contents(place: Path) -> dict:
    """Everything below a folder, byte for byte."""
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def vanish(name: str) -> None:
    """The folder of runs is moved away, as if its disk were pulled out."""
    os.rename("saves", "moved")


def lock_up(name: str) -> None:
    """The folder of the run becomes read-only."""
    no_privileges()
    run_folder(Path()).chmod(0o555)


def no_privileges() -> None:
    """Permissions hold for root too, from here on in this process (capset(2) without the CAP_DAC ones)."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    libc.capget(header, sets)
    for word in range(3):
        sets[word] &= ~0b110  # effective, permitted, inheritable
    libc.capset(header, sets)


def second_process(script: str, name: str) -> None:
    """Another process tries to resume the run that this one is in the middle of. It is refused and changes nothing."""
    place = Path().resolve()
    before = contents(place)
    outcome = session(place, script, ["--resume", str(run_folder(place))])
    right = outcome.status == 1 and "another process is working on" in outcome.err and contents(place) == before
    assert right, outcome


def at_moments(task: Task, act, ends: dict, step: int = 1, resumes: bool = False) -> None:
    """Something happens at each `step`-th moment; what befalls a run's folder, only when it is there."""
    names = task.resumes if resumes else task.starts
    first = 1 if act in (kill, full_disk) else names.index("config.json: rename, after") + 2
    for number in range(first, len(names) + 1, step):
        task.disturb(names[number - 1], ends, partial(watch, act, number), resumes=resumes)


def with_auto(task: Task) -> None:
    """Each session is the same command, with --resume auto: it starts the run, or goes on with it."""
    task.auto = ["--resume", "auto"]
    at_moments(task, kill, KILLED, 2)
    task.auto = []


def at_random(task: Task, number: int) -> None:
    """A signal at a random time, in up to a dozen sessions of a run."""
    generator = random.Random(f"{number} {task.script}")
    for _ in range(10):
        task.disturb("at random", {0: "", -number: "", 128 + number: "stopped"}, sessions=12,
                     sent=lambda: (generator.uniform(0.03, 1.3 * task.seconds), number))


def stopped(task: Task, *numbers: int, before=lambda: None) -> None:
    """A signal in the first update: the run saves, and says how to go on."""
    for number in numbers:
        task.disturb(signal.strsignal(number), {128 + number: "stopped and saved; go on with python"},
                     lambda number=number: (before(), at_updates({1}, lambda _: os.kill(os.getpid(), number))))


def nobody_reads(task: Task) -> None:
    def inside():
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
    task.disturb("a closed pipe", {128 + signal.SIGPIPE: "stopped and saved; go on with"}, inside)


def small_files(task: Task) -> None:
    for size in (40, 100, 200, 1_500, 3_000, 5_000, task.largest // 2, task.largest - 100):
        task.disturb(f"{size} bytes", {0: "curves.png could not be drawn", 1: "could not be written"},
                     partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)))


def change(name: str, how):
    """For `spoil`: change the bytes of a file of the run."""
    def spoil(place: Path) -> None:
        path = run_folder(place) / name
        path.write_bytes(how(path.read_bytes()))
    return spoil


def read_only(task: Task) -> None:
    task.disturb("a new run", {2: "choose another place with --save"}, no_privileges, refused=True,
                 spoil=lambda place: (place / "saves").mkdir(mode=0o555))
    task.disturb("a resumed run", {2: "cannot be written to"}, no_privileges, refused=True, resumes=True,
                 spoil=lambda place: [path.chmod(0o555) for path in place.rglob("*")])


def damaged_files(task: Task) -> None:
    for name in ("config.json", "last.pt", "log.csv"):
        for size in (0, 50):
            task.disturb(f"{size} bytes of {name}", {1: "cannot be used|is shorter than"}, resumes=True,
                         refused=True, spoil=change(name, lambda whole, size=size: whole[:size]))


def as_on_a_gpu() -> None:
    """What this process saves says that it lay on a GPU."""
    torch.serialization.register_package(0, lambda tensor: "cuda:0", lambda storage, location: None)
    assert torch.serialization.location_tag(torch.zeros(1).untyped_storage()) == "cuda:0"


KILLED, FULL = {-signal.SIGKILL: ""}, "No space left on device"
LOST = {0: "", 1: "could not be written|is missing|No such file"}
TROUBLES = {
    "SIGKILL at a random moment": lambda task: at_random(task, signal.SIGKILL),
    "SIGKILL at every moment of a session that starts": lambda task: at_moments(task, kill, KILLED),
    "SIGKILL at every moment of a session that resumes": lambda task: at_moments(task, kill, KILLED, resumes=True),
    "SIGKILL at every second moment of a session with --resume auto, which is the same command each time": with_auto,
    "SIGTERM at a random moment": lambda task: at_random(task, signal.SIGTERM),
    "SIGINT at every fifth moment": lambda task: at_moments(
        task, lambda name: os.kill(os.getpid(), signal.SIGINT), {0: "", 130: "stopped"}, 5),
    "a signal in the first update": lambda task: stopped(
        task, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
    "the reader of the output goes away (as with a pipe into head)": nobody_reads,
    "a full disk at every third moment": lambda task: at_moments(task, full_disk, {0: "", 1: FULL, 2: FULL}, 3),
    "a real limit on the size of files, from 40 bytes to just below the largest one": small_files,
    "a folder that vanishes, at every seventh moment": lambda task: at_moments(task, vanish, LOST, 7),
    "a folder that becomes read-only, at every seventh moment": lambda task: at_moments(task, lock_up, LOST, 7),
    "a folder that cannot be written to": read_only,
    "a second process, refused at every ninth moment of the first": lambda task: at_moments(
        task, partial(second_process, task.script), {0: ""}, 9),
    "a damaged file": damaged_files,
    "a command whose bytes are no UTF-8": lambda task: task.disturb(
        "argv", {0: ""}, resumes=True, spoil=change("config.json", lambda whole: whole.replace(
            b'"argv": [', b'"argv": ["\\ud800",'))),
    "a checkpoint of a GPU, resumed on a CPU": lambda task: stopped(task, signal.SIGTERM, before=as_on_a_gpu),
    "a run that another version of torch started": lambda task: task.disturb(
        "torch 2.6.0", {0: "not as it was started: torch 2.6.0"}, resumes=True,
        spoil=change("config.json", lambda whole: whole.replace(torch.__version__.encode(), b"2.6.0"))),
}
