"""The runs of a table: their commands, and a pool that runs several at a time and stops them saved."""

import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from common.errors import UserError, when_asked_to_stop
from common.runs.records import is_diverged, read_config, read_result
from evidence.rows import Row, epochs_of

SAVED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # status of a run stopped before its first update, or later


def commands_of(rows: list[Row], seeds, folder: Path, more: list[str], left: bool = False, until: int | None = None
                ) -> list[list[str]]:
    """The commands of all runs of a table, one seed of everything first: each starts its run or goes on with it.

    With `left` only those of runs that are missing: not finished, not diverged and not yet through epoch `until`.
    """
    more = [*more, *(["--until-epoch", str(until)] if until else [])]
    return [[*row.command(seed), "--save", str(folder), "--resume", "auto", "--no-curves", *more]
            for seed in dict.fromkeys(seeds) for row in rows
            if not row.own and (not left or is_left(row.runs.get(seed), until))]


def is_left(run: Path | None, until: int | None) -> bool:
    """Whether there is something to do for a run, None where it has not begun."""
    return run is None or not (read_result(run) is not None or is_diverged(run) or is_through(run, until))


def is_through(run: Path, epoch: int | None) -> bool:
    """Whether the log of a run holds `epoch` and the run would go on after it: its last epoch ends with the test."""
    return epoch is not None and any(row["epoch"] >= epoch for row in epochs_of(run)) \
        and read_config(run)["options"]["epochs"]["value"] > epoch


def _interrupt(number, frame):
    raise KeyboardInterrupt


@when_asked_to_stop(_interrupt, "SIGTERM", "SIGHUP")
def run_all(commands: list[list[str]], jobs: int) -> int:
    """Run the commands, `jobs` at a time, in this folder; → how many failed. What stops this stops every run, saved."""
    pool, running, started, told = ThreadPoolExecutor(jobs), set(), {}, set()

    def run(command: list[str]) -> tuple[int, str]:
        """In a process of its own, which a terminal's Ctrl-C does not reach → its exit status and its last words."""
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              start_new_session=True) as process:
            running.add(process)
            said = process.communicate()[1].decode(errors="replace").split("\n")
        running.discard(process)
        return process.returncode, next(filter(None, reversed(said)), f"status {process.returncode}")

    def tell(job) -> int:
        status, words = job.result()
        how = {0: "done", **dict.fromkeys(SAVED, "stopped")}.get(status, f"FAILED ({words})")
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

    try:
        started.update({pool.submit(run, command): command for command in commands})
        return sum(map(tell, as_completed(started)))
    except KeyboardInterrupt:
        print("stopping: every run saves first", flush=True)
        stop()
        for job in started.keys() - told:
            if not job.cancelled():
                tell(job)
        raise UserError("stopped; the same command goes on", 130) from None
    finally:
        stop()
