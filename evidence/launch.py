"""The runs of a table: their commands, and the loop that runs several at a time and stops them saved."""

import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

from common.errors import UserError, when_asked_to_stop
from common.runs.records import is_diverged, read_result
from common.runs.run import STOPPING
from evidence.rows import Row

TELL_SECONDS = 60


def commands_of(rows: list[Row], seeds, folder: Path, more: list[str], left: bool = False) -> list[list[str]]:
    """The commands of all runs of a table, one seed of everything first: each starts its run or goes on with it.

    With `left` only those of runs that are missing: not finished and not diverged.
    """
    return [[*row.command(seed), "--save", str(folder), "--resume", "auto", "--no-curves", *more]
            for seed in dict.fromkeys(seeds) for row in rows
            if not row.why_no_command and (not left or is_left(row.runs.get(seed)))]


def is_left(run: Path | None) -> bool:
    """Whether there is something to do for a run, None where it has not begun."""
    return run is None or (read_result(run) is None and not is_diverged(run))


class Run:
    """A run in a process of its own, which a terminal's Ctrl-C does not reach. A thread reads what it says."""

    def __init__(self, command: list[str]):
        self.name, self.words = shlex.join(command), ""
        self.news = [f"started {self.name}"]  # lines that are to be printed
        self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        start_new_session=True, text=True, errors="replace")
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in filter(str.strip, lines):
                self.words = line.rstrip()
                if line.startswith(("writing to ", "going on with ")):
                    self.news.append(f"  {self.words}/log.csv")

    def end(self) -> str:
        """Wait for its end; → how it ended."""
        status = self.process.wait()
        self.reader.join()
        is_stopped = status < 0 or "stopped and saved" in self.words or "stopped before" in self.words
        return "done" if status == 0 else "stopped" if is_stopped else f"FAILED ({self.words or f'status {status}'})"


def run_all(commands: list[list[str]], jobs: int) -> int:
    """Run the commands, `jobs` at a time, in this folder; → how many failed. What stops this stops every run, saved.

    Says what starts, where its log lies, how it ended, and once a minute the last report of each run.
    """
    left, running, ended, asked, due = [*commands], [], [], [], time.monotonic() + TELL_SECONDS

    def show(run: Run) -> None:
        while run.news:
            print(run.news.pop(0), flush=True)

    def tell(run: Run) -> None:
        ended.append(run.end())
        running.remove(run)
        show(run)
        print(f"{len(ended)}/{len(commands)} {run.name}: {ended[-1]}", flush=True)

    with when_asked_to_stop(lambda number, frame: asked.append(number), *STOPPING):
        try:
            while (left or running) and not asked:
                while left and len(running) < jobs:
                    running.append(Run(left.pop(0)))
                time.sleep(0.2)
                if time.monotonic() > due:
                    due += TELL_SECONDS
                    for run in running:
                        run.news.append(f"  {run.words}")
                for run in [*running]:
                    show(run)
                    if run.process.poll() is not None:
                        tell(run)
            if asked:
                print("stopping: every run saves first", flush=True)
        finally:  # whatever ended this, such as a closed output
            for run in running:
                run.process.terminate()
            for run in running:
                run.end()
        for run in [*running]:
            tell(run)
    if asked:
        raise UserError("stopped; the same command goes on", 128 + asked[0])
    return sum(how.startswith("FAILED") for how in ended)
