"""SIGKILL, at random and at every moment of every write; resumed, and compared with an uninterrupted run."""

import json
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.robustness.moments import at, kill, write_names
from tests.robustness.sessions import TASKS, Session, Workplace, damage, differences, go_on, run_folder, uninterrupted

MOST_KILLS = 12  # of one run


@dataclass
class Campaign:
    """What was tried and what came of it."""

    what: str
    task: str
    runs: int = 0
    kills: int = 0
    same: int = 0
    detail: Counter = field(default_factory=Counter)
    wrong: list = field(default_factory=list)

    def judge(self, place: Path, expected: dict, where: str) -> None:
        """Compare the finished run in `place`."""
        found = differences(run_folder(place), expected)
        self.runs += 1
        self.same += not found
        if found:
            self.wrong.append(f"{where}: {', '.join(found)}")


def random_kills(workplace: Workplace, task: str, wanted: int, seed: int, seconds: float) -> Campaign:
    """Runs that are killed after random times, resumed and killed again, until `wanted` kills or `seconds` are over."""
    expected, duration = uninterrupted(workplace, task)
    generator, end = random.Random(f"{seed} {task}"), time.monotonic() + seconds
    campaign = Campaign("at a random moment", task)
    while campaign.kills < wanted and time.monotonic() < end:
        place = workplace.new_folder()
        sessions = 0
        while True:
            session = Session(place, TASKS[task][0], go_on(workplace, place, task))
            if sessions < MOST_KILLS:  # a busy machine may never let a session come to its end before its time
                session.signal_after(generator.uniform(0, 1.3 * duration), signal.SIGKILL)
            outcome = session.wait()
            if outcome.status == 0:
                break
            sessions += 1
            if outcome.status != -signal.SIGKILL or damage(run_folder(place), expected):
                campaign.wrong.append(outcome.err or str(damage(run_folder(place), expected)))
                break
        campaign.kills += sessions
        campaign.judge(place, expected, f"killed {sessions} times at random")
        shutil.rmtree(place)
    return campaign


def moments_of(workplace: Workplace, task: str, place: Path, arguments) -> list[str]:
    """The names of all moments of a session."""
    names = workplace.folder / "moments.json"
    outcome = Session(place, TASKS[task][0], arguments, write_names(names)).wait()
    if outcome.status != 0:
        raise RuntimeError(f"the session of {task} does not work: {outcome.err}")
    return json.loads(names.read_text())


def interrupted(workplace: Workplace, task: str) -> Path:
    """A run killed after its third row and before the checkpoint that counts on it, so that resuming cuts the log."""
    place = workplace.new_folder()
    names = moments_of(workplace, task, workplace.new_folder(), workplace.arguments(task))
    third = [number for number, name in enumerate(names, 1) if name == "log.csv: written"][2]
    Session(place, TASKS[task][0], workplace.arguments(task), at(third, kill)).wait()
    return place


def aimed_kills(workplace: Workplace, task: str, resumed: bool = False, every: int = 1) -> Campaign:
    """A kill at every moment (or each `every`-th) of a session that starts a run, or of one that resumes it."""
    expected, _ = uninterrupted(workplace, task)
    campaign = Campaign("at every moment of a session that " + ("resumes" if resumed else "starts"), task)
    start = interrupted(workplace, task) if resumed else None

    def fresh() -> Path:
        place = workplace.new_folder()
        if resumed:
            shutil.copytree(start, place, dirs_exist_ok=True)
        return place

    place = fresh()
    names = moments_of(workplace, task, place, go_on(workplace, place, task))
    for number in range(1, len(names) + 1, every):
        place, name = fresh(), names[number - 1]
        outcome = Session(place, TASKS[task][0], go_on(workplace, place, task), at(number, kill)).wait()
        campaign.kills += outcome.status == -signal.SIGKILL
        campaign.detail[name] += 1
        if found := damage(run_folder(place), expected):
            campaign.wrong.append(f"{name}: {', '.join(found)}")
        last = Session(place, TASKS[task][0], go_on(workplace, place, task)).wait()
        if last.status != 0:
            campaign.wrong.append(f"{name}: {last.err}")
        campaign.judge(place, expected, name)
        shutil.rmtree(place)
    return campaign
