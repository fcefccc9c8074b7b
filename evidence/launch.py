"""The runs of a table: their commands, and a pool that runs several at a time and stops them saved."""

import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from common.errors import UserError, when_asked_to_stop
from common.runs.records import is_diverged, read_result
from evidence.rows import Row

STOPPING = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # all that a run stops at, saved; SIGINT beside them
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


class Asked(Exception):
    """A signal asked to stop."""


def _ask(number, frame):
    raise Asked(number)


@when_asked_to_stop(_ask, *STOPPING)
def run_all(commands: list[list[str]], jobs: int) -> int:
    """Run the commands, `jobs` at a time, in this folder; → how many failed. What stops this stops every run, saved.

    Says what starts, where its log lies, how it ended, and once a minute the last report of each run.
    """
    pool, running, started, told, said = ThreadPoolExecutor(jobs), {}, {}, set(), deque()

    def run(command: list[str]) -> tuple[int, str]:
        """In a process of its own, which a terminal's Ctrl-C does not reach → its exit status and its last words."""
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              start_new_session=True, text=True, errors="replace") as process:
            running[process] = ""
            said.append(f"started {shlex.join(command)}")
            for line in filter(str.strip, process.stdout):
                running[process] = line.rstrip()
                if line.startswith(("writing to ", "going on with ")):
                    said.append(f"  {line.rstrip()}/log.csv")
        return process.returncode, running.pop(process) or f"status {process.returncode}"

    def show() -> None:
        while said:
            print(said.popleft(), flush=True)

    def tell(job) -> int:
        status, words = job.result()
        is_stopped = status < 0 or "stopped and saved" in words or "stopped before" in words
        how = "done" if status == 0 else "stopped" if is_stopped else f"FAILED ({words})"
        told.add(job)
        print(f"{len(told)}/{len(commands)} {shlex.join(started[job])}: {how}", flush=True)
        return how.startswith("FAILED")

    def stop() -> None:
        """Stop every run, whatever ended this function, such as a closed output."""
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(job.done() for job in started):
            for process in list(running):
                process.terminate()  # SIGTERM: what a shell started in the background ignores Ctrl-C
            time.sleep(0.2)

    failed, due = 0, time.monotonic() + TELL_SECONDS
    try:
        started.update({pool.submit(run, command): command for command in commands})
        while left := started.keys() - told:
            ended, _ = wait(left, 0.5, FIRST_COMPLETED)
            if time.monotonic() > due:
                due += TELL_SECONDS
                said.extend(f"  {words}" for words in list(running.values()))
            show()
            failed += sum(map(tell, ended))
        return failed
    except (KeyboardInterrupt, Asked) as asked:
        said.append("stopping: every run saves first")
        show()
        stop()
        for job in started.keys() - told:
            if not job.cancelled():
                tell(job)
        number = asked.args[0] if isinstance(asked, Asked) else signal.SIGINT
        raise UserError("stopped; the same command goes on", 128 + number) from None
    finally:
        stop()
