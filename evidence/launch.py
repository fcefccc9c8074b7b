"""The runs of a table: their commands, and the loop that runs several at a time and stops them saved."""

import os
import shlex
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

from common.errors import UserError, when_asked_to_stop
from common.runs.records import is_diverged, read_result
from common.runs.run import STOPPING
from evidence.rows import Row

TELL_SECONDS = 60


def commands_of(rows: list[Row], seeds, folder: Path, more: list[str], left: bool = False) -> list[list[str]]:
    """The commands that start or go on with all runs of a table, with `left` with those that have not ended."""
    return [[*row.command(seed), "--save", str(folder), "--resume", "auto", "--no-curves", *more]
            for seed in dict.fromkeys(seeds) for row in rows
            if not row.why_no_command and (not left or is_left(row.runs.get(seed)))]


def is_left(run: Path | None) -> bool:
    """Whether there is something to do for a run, None where it has not begun."""
    return run is None or (read_result(run) is None and not is_diverged(run))


def run_all(commands: list[list[str]], jobs: int) -> int:
    """Run the commands, `jobs` at a time, in this folder; → how many failed. What stops this stops every run, saved."""
    running, asked, ended = [], [], []

    def say(line: str) -> None:  # in one piece, because several threads print
        try:
            print(line + "\n", end="", flush=True)
        except OSError:
            stop(0)
            raise

    def stop(number, frame=None):
        if number and not asked:
            os.write(2, b"stopping: every run saves first\n")  # print may be interrupted by this very signal
        asked.append(number)
        for process in [*running]:
            process.terminate()

    def run(command: list[str]) -> tuple[str, str]:
        """In a thread of the pool: a process that a terminal's Ctrl-C does not reach → its command, how it ended."""
        name, words, due = shlex.join(command), "", time.monotonic() + TELL_SECONDS
        if asked:
            return name, ""
        say(f"started {name}")
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              start_new_session=True, text=True, errors="replace") as process:
            running.append(process)
            if asked:  # since the line before
                process.terminate()
            for line in filter(str.strip, process.stdout):
                words = line.rstrip()
                if line.startswith(("writing to ", "going on with ")):
                    say(f"  {words}/log.csv")
                elif time.monotonic() > due:
                    due = time.monotonic() + TELL_SECONDS
                    say(f"  {words}")
        running.remove(process)
        status = process.returncode
        is_stopped = status < 0 or "stopped and saved" in words or "stopped before" in words
        return name, "done" if status == 0 else "stopped" if is_stopped else f"FAILED ({words or f'status {status}'})"

    pool = ThreadPool(max(1, min(jobs, len(commands))))
    with when_asked_to_stop(stop, *STOPPING):
        try:
            for name, how in pool.imap_unordered(run, commands):
                if how:
                    ended.append(how)
                    say(f"{len(ended)}/{len(commands)} {name}: {how}")
        finally:  # whatever ended this, such as a closed output
            stop(0)
            pool.close()
            pool.join()
    if asked[0]:
        raise UserError("stopped; the same command goes on", 128 + asked[0])
    return sum(how.startswith("FAILED") for how in ended)
