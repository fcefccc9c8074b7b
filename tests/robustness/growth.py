"""Long and large: many updates grow nothing but the log; a long sequence takes the memory that was foretold."""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from common.runs import machine, run
from tests.robustness.sessions import Session, Workplace, run_folder

LONG = ("--net-type", "expRNN", "--nhid", "8", "--T", "4", "--c-length", "2", "--batch", "2", "--threads", "1",
        "--log-interval", "1000")
LARGE = ("--net-type", "expRNN", "--nhid", "128", "--T", "100000", "--updates", "2", "--threads", "1")
TOO_LARGE = ("--nhid", "128", "--T", "2000000000", "--updates", "1")


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


@dataclass
class Growth:
    """A long run at two points: after `early` and after `late` updates."""

    early: dict
    late: dict
    files: int
    log_bytes_a_row: float

    @property
    def holds(self) -> bool:
        same = self.late["folder"] - self.late["log"] < 1.02 * (self.early["folder"] - self.early["log"]) + 200
        return same and self.late["memory"] < self.early["memory"] + 16e6 and \
            self.late["step"] < 1.5 * self.early["step"]


def early_point(updates: int) -> int:
    """After a tenth of the updates, and after the first checkpoint."""
    return max(2000, updates // 10)


def many_updates(workplace: Workplace, updates: int) -> Growth:
    """A tiny copying run; memory, time of a step and sizes of the files after a tenth of it and at its end."""
    place, early = workplace.new_folder(), early_point(updates)

    def measured():
        report, points, clock = run.Run.report, {}, [time.process_time(), 0]

        def sampling(self, line, **row):
            report(self, line, **row)
            now, update = time.process_time(), row["update"]
            points.setdefault("steps", []).append((now - clock[0]) / (update - clock[1]))
            clock[:] = now, update
            if update in (early, updates):
                sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
                points[update] = {"memory": memory("VmRSS"), "folder": sum(sizes.values()), "log": sizes["log.csv"],
                                  "step": sorted(points["steps"][-5:])[len(points["steps"][-5:]) // 2]}
                Path("points.json").write_text(json.dumps(points))
        run.Run.report = sampling

    outcome = Session(place, "copytask_nvar", [*LONG, "--updates", updates], measured).wait(1800)
    if outcome.status:
        raise RuntimeError(f"the long run does not work: {outcome.err}")
    points, folder = json.loads((place / "points.json").read_text()), run_folder(place)
    rows = (folder / "log.csv").read_text().count("\n")
    return Growth(points[str(early)], points[str(updates)], len(list(folder.iterdir())),
                  (folder / "log.csv").stat().st_size / rows)


def one_long_sequence(workplace: Workplace) -> tuple[float, float, str]:
    """T = 100,000 at H 128: (foretold, measured) bytes at the peak of an update, and how it ended."""
    place = workplace.new_folder()

    def measured():
        foretold, advance, base = machine.memory_needed, run.Run.advance, memory("VmRSS")

        def noted(options: argparse.Namespace) -> int:
            needed = foretold(options)
            Path("foretold.txt").write_text(str(needed))
            return needed

        def sampled(self, steps=1):
            Path("measured.txt").write_text(str(memory("VmHWM") - base))
            advance(self, steps)

        machine.memory_needed, run.Run.advance = noted, sampled

    outcome = Session(place, "copytask_nvar", LARGE, measured).wait(600)
    numbers = [float(path.read_text()) if path.exists() else 0.0
               for path in (place / "foretold.txt", place / "measured.txt")]
    return *numbers, "runs" if outcome.status == 0 else outcome.err.strip()


def one_too_long(workplace: Workplace) -> tuple[str, float]:
    """The sentence with which a run that cannot fit is refused, and after how many seconds."""
    outcome = Session(workplace.new_folder(), "copytask_nvar", TOO_LARGE).wait(60)
    return outcome.sentence() if outcome.status == 1 else f"status {outcome.status}: {outcome.err}", outcome.seconds
