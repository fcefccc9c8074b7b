"""Troubles: signals, disks and folders that fail, two processes, other machines, changed options.

Each ends in one sentence, or works. Nothing that was already saved is harmed: the disturbed run goes on, once the
trouble is over, and ends bit for bit as the uninterrupted one.
"""

import errno
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.runs import run
from tests.robustness.kills import MOST_KILLS, moments_of
from tests.robustness.moments import at, full_disk, hold, lock_up, no_privileges, vanish
from tests.robustness.sessions import (
    TASKS,
    Outcome,
    Session,
    Workplace,
    damage,
    differences,
    go_on,
    run_folder,
    uninterrupted,
)


@dataclass
class Trouble:
    """What was tried, how often, how it ended."""

    what: str
    tried: int = 0
    well: int = 0
    sentences: set = field(default_factory=set)
    wrong: list = field(default_factory=list)

    def judge(self, where: str, *problems: str | None) -> None:
        found = [problem for problem in problems if problem]
        self.tried += 1
        self.well += not found
        if found:
            self.wrong.append(f"{where}: {'; '.join(found)}")

    def told(self, outcome: Outcome, status: int, *parts: str) -> str | None:
        """None if a session ended with `status` and one sentence that holds one of `parts`; else what was wrong."""
        held = [part for part in parts if part in (outcome.sentence() or "")]
        if outcome.status == status and held:
            self.sentences.add(held[0])
            return None
        return f"status {outcome.status}: {outcome.err[-300:]}"


def finished(workplace: Workplace, place: Path, task: str, expected: dict) -> str | None:
    """Let the run in `place` go on to its end; None if it is then the uninterrupted one."""
    if found := damage(run_folder(place), expected):
        return ", ".join(found)
    outcome = Session(place, TASKS[task][0], go_on(workplace, place, task)).wait()
    return outcome.err[-300:] if outcome.status else ", ".join(differences(run_folder(place), expected)) or None


def contents(folder: Path) -> dict:
    """Every file of a run's folder, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def stopped(workplace: Workplace, task: str, place: Path | None = None) -> Path:
    """The place of a run that was asked to stop after its first update, and saved."""
    place = place or workplace.new_folder()
    Session(place, TASKS[task][0], workplace.arguments(task), ask_after(1)).wait()
    return place


def ask_after(updates: int, number: int = signal.SIGTERM):
    """For `Session(prepare=...)`: send this process a signal after so many updates."""
    def prepare():
        advance, left = run.Run.advance, [updates]

        def counting(self, steps=1):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            advance(self, steps)

        run.Run.advance = counting
    return prepare


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────


def signals(workplace: Workplace, number: int, times: int, seed: int) -> Trouble:
    """A signal at a random moment, again and again until the run is finished."""
    trouble = Trouble(f"{signal.Signals(number).name} at a random moment")
    generator, allowed = random.Random(f"{seed} {number}"), {128 + number: ("stopped",), 0: ()}
    while trouble.tried < times:
        for task in TASKS:
            expected, duration = uninterrupted(workplace, task)
            place, outcome, sent = workplace.new_folder(), None, 0
            while outcome is None or outcome.status != 0:
                session = Session(place, TASKS[task][0], go_on(workplace, place, task))
                if sent < MOST_KILLS:
                    session.signal_after(generator.uniform(0.03, 1.3 * duration), number)
                outcome, sent = session.wait(), sent + 1
                early = outcome.status == -number or outcome.sentence() == f"{TASKS[task][0]}.py: stopped"
                if not early and outcome.status:  # `early`: in the milliseconds before the run takes hold of it
                    trouble.judge(task, trouble.told(outcome, 128 + number, "stopped"))
                if not early and outcome.status not in allowed:
                    break
            trouble.judge(task, ", ".join(differences(run_folder(place), expected)))
    return trouble


def deadlines(workplace: Workplace) -> Trouble:
    """A signal after each update: the checkpoint is of exactly that update."""
    trouble = Trouble("SIGINT, SIGTERM and SIGHUP after the first update")
    for task in TASKS:
        expected, _ = uninterrupted(workplace, task)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            place = workplace.new_folder()
            outcome = Session(place, TASKS[task][0], workplace.arguments(task), ask_after(1, number)).wait()
            told = trouble.told(outcome, 128 + number, "stopped and saved; go on with python")
            trouble.judge(f"{task}, {number!r}", told, finished(workplace, place, task, expected))
    return trouble


def closed_output(workplace: Workplace) -> Trouble:
    """Nobody reads what the run says any more: `python copytask_nvar.py | head -3`."""
    trouble = Trouble("the reader of the output goes away (as with a pipe into head)")
    for task in TASKS:
        expected, _ = uninterrupted(workplace, task)
        place = workplace.new_folder()

        def into_a_closed_pipe():
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, 1)

        outcome = Session(place, TASKS[task][0], workplace.arguments(task), into_a_closed_pipe).wait()
        told = trouble.told(outcome, 128 + signal.SIGPIPE, "stopped and saved; go on with")
        trouble.judge(task, told, finished(workplace, place, task, expected))
    return trouble


# ── disks and folders ────────────────────────────────────────────────────────────────────────────────────


def at_every_moment(workplace: Workplace, what: str, act, every: int, *parts: str) -> Trouble:
    """Something happens at every moment of a write; the run says so in a sentence, and goes on when it is over."""
    trouble = Trouble(what)
    for task in TASKS:
        expected, _ = uninterrupted(workplace, task)
        names = moments_of(workplace, task, workplace.new_folder(), workplace.arguments(task))
        first = 1 + names.index("config.json: rename, after")
        for number in range(first + 1 if act in (vanish, lock_up) else 1, len(names) + 1, every):
            place, name = workplace.new_folder(), names[number - 1]
            session = Session(place, TASKS[task][0], workplace.arguments(task), at(number, act))
            outcome = session.wait()
            told = None if outcome.status == 0 and not outcome.err else trouble.told(outcome, outcome.status, *parts)
            if outcome.status not in (0, 1, 2):
                told = f"status {outcome.status}: {outcome.err[-300:]}"
            if (place / "moved").exists():
                shutil.rmtree(place / "saves", ignore_errors=True)
                (place / "moved").rename(place / "saves")
            for folder in place.glob("saves/*/*"):
                folder.chmod(0o755)
            trouble.judge(f"{task}, {name}", told, finished(workplace, place, task, expected))
            shutil.rmtree(place)
    return trouble


def small_limit(workplace: Workplace) -> Trouble:
    """The system itself refuses: no file of this process may be larger than so many bytes (RLIMIT_FSIZE)."""
    trouble = Trouble("a real limit on the size of files, from 40 bytes to just below the largest one")
    for task in TASKS:
        expected, _ = uninterrupted(workplace, task)
        place = workplace.new_folder()
        Session(place, TASKS[task][0], workplace.arguments(task)).wait()
        largest = max(path.stat().st_size for path in run_folder(place).iterdir())  # a limit above it refuses nothing
        for size in (40, 100, 200, 1_500, 3_000, 5_000, largest // 2, largest - 100):
            place = workplace.new_folder()
            reading, writing = os.pipe()
            outcome = Session(place, TASKS[task][0], workplace.arguments(task), limit_of(size, writing)).wait()
            os.close(writing)
            with open(reading, encoding="utf-8") as pipe:
                outcome.err = pipe.read().splitlines(keepends=True)[-1]
            told = trouble.told(outcome, 1, "could not be written")
            trouble.judge(f"{task}, {size} bytes", told, finished(workplace, place, task, expected))
    return trouble


def limit_of(size: int, pipe: int):
    """For `Session(prepare=...)`: no file above `size` bytes. What the session says goes to a pipe, not to a file."""
    def prepare():
        os.dup2(pipe, 1)
        os.dup2(pipe, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return prepare


def read_only(workplace: Workplace) -> Trouble:
    """A folder that may be read and not written, for a new run and for a resumed one."""
    trouble = Trouble("a folder that cannot be written to")
    for task, (script, _) in TASKS.items():
        expected, _ = uninterrupted(workplace, task)
        place = workplace.new_folder()
        (place / "saves").mkdir(mode=0o555)
        outcome = Session(place, script, workplace.arguments(task), no_privileges).wait()
        left = list((place / "saves").iterdir())
        trouble.judge(task, trouble.told(outcome, 2, "choose another place with --save"), str(left) if left else None)

        place = stopped(workplace, task)
        folder, before = run_folder(place), contents(run_folder(place))
        (folder / ".lock").chmod(0o444)
        folder.chmod(0o555)
        outcome = Session(place, script, ["--resume", folder], no_privileges).wait()
        told = trouble.told(outcome, 1, "cannot be written to")
        same = None if contents(folder) == before else "the folder changed"
        folder.chmod(0o755)
        (folder / ".lock").chmod(0o644)
        trouble.judge(task, told, same, finished(workplace, place, task, expected))
    return trouble


def two_processes(workplace: Workplace) -> Trouble:
    """A second process resumes what a first is working on, while that one stands in the middle of a write."""
    trouble = Trouble("a second process on the folder, at every ninth moment of the first")
    for task, (script, _) in TASKS.items():
        expected, _ = uninterrupted(workplace, task)
        names = moments_of(workplace, task, workplace.new_folder(), workplace.arguments(task))
        for number in range(2 + names.index("config.json: rename, after"), len(names) + 1, 9):
            place = workplace.new_folder()
            first = Session(place, script, workplace.arguments(task), at(number, hold))
            while not (place / "held").exists():
                time.sleep(0.005)
            folder = run_folder(place)
            before = contents(folder)
            beside = workplace.new_folder()
            second = Session(beside, script, ["--resume", folder]).wait()
            told = trouble.told(second, 1, "another process is working on")
            same = None if contents(folder) == before else "the folder changed"
            (place / "release").touch()
            outcome = first.wait()
            trouble.judge(f"{task}, {names[number - 1]}", told, same, outcome.err or None,
                          ", ".join(differences(folder, expected)))
    return trouble


# ── another machine ──────────────────────────────────────────────────────────────────────────────────────


def another_device(workplace: Workplace) -> Trouble:
    """Checkpoints whose tensors say that they lay on a GPU, resumed without one."""
    trouble = Trouble("a checkpoint of a GPU, resumed on a CPU")

    def as_if_on_a_gpu():
        torch.serialization.register_package(0, lambda tensor: "cuda:0", lambda storage, location: None)
        ask_after(1)()

    for task, (script, _) in TASKS.items():
        expected, _ = uninterrupted(workplace, task)
        place = workplace.new_folder()
        Session(place, script, workplace.arguments(task), as_if_on_a_gpu).wait()
        try:
            torch.load(run_folder(place) / "last.pt", weights_only=True)
            marked = "the checkpoint does not say that it is of a GPU"
        except RuntimeError:
            marked = None  # torch says: deserialize on a CUDA device
        outcome = Session(place, script, go_on(workplace, place, task)).wait()
        trouble.judge(task, marked, outcome.err or None, ", ".join(differences(run_folder(place), expected)))
    return trouble


def another_version(workplace: Workplace) -> Trouble:
    """A run that was started with another torch: it goes on, and says in a line that it does."""
    trouble = Trouble("a run that another version of torch started")
    for task, (script, _) in TASKS.items():
        expected, _ = uninterrupted(workplace, task)
        place = stopped(workplace, task)
        config = run_folder(place) / "config.json"
        config.write_text(config.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.6.0"'))
        outcome = Session(place, script, go_on(workplace, place, task)).wait()
        said = f"not as it was started: torch 2.6.0 → {torch.__version__}" in outcome.out
        trouble.judge(task, None if said else "no line", outcome.err or None,
                      ", ".join(differences(run_folder(place), expected)))
    return trouble


def changed_options(workplace: Workplace) -> Trouble:
    """An option that cannot change on the way is refused; those that may are taken."""
    trouble = Trouble("a resume with a changed option")
    for task, (script, _) in TASKS.items():
        expected, _ = uninterrupted(workplace, task)
        place = stopped(workplace, task)
        folder = run_folder(place)
        before = contents(folder)
        for typed in (("--nhid", 10), ("--lr", 0.5), ("--batch", 2), ("--net-type", "RNN-Orth"), ("--seed", 1),
                      ("--nonlin", "tanh"), ("--log-interval", 7), ("--save", "elsewhere")):
            outcome = Session(place, script, ["--resume", folder, *typed]).wait()
            told = trouble.told(outcome, 2, "on the way; start a new run")
            trouble.judge(f"{task}, {typed}", told, None if contents(folder) == before else "the folder changed")
        outcome = Session(place, script, ["--resume", folder, "--threads", 1]).wait()
        trouble.judge(task, outcome.err or None, ", ".join(differences(folder, expected)))
    return trouble


def all_troubles(workplace: Workplace, seed: int, times: int = 40, every: int = 1):
    """Every trouble in turn, as a generator: the campaign is long enough to be watched."""
    yield signals(workplace, signal.SIGTERM, times, seed)
    yield signals(workplace, signal.SIGINT, times, seed)
    yield deadlines(workplace)
    yield closed_output(workplace)
    yield at_every_moment(workplace, "a full disk (ENOSPC) at every third moment of a write", full_disk,
                          3 * every, os.strerror(errno.ENOSPC))
    yield small_limit(workplace)
    yield at_every_moment(workplace, "a folder that vanishes, at every seventh moment", vanish, 7 * every,
                          "could not be written", "is missing")
    yield at_every_moment(workplace, "a folder that becomes read-only, at every seventh moment", lock_up, 7 * every,
                          "could not be written")
    yield read_only(workplace)
    yield two_processes(workplace)
    yield another_device(workplace)
    yield another_version(workplace)
    yield changed_options(workplace)
