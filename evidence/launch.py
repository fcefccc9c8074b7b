"""Runs what a table is missing: several processes at a time, each of which saves when it is stopped."""

import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.errors import UserError, when_asked_to_stop
from common.runs.records import is_diverged, read_config, read_result
from evidence.rows import Row, epochs_of


def missing(rows: list[Row], seeds, folder: Path, threads: int, more: list[str], until: int | None = None
            ) -> list[list[str]]:
    """The commands that would finish the table: a new run, or --resume for one that is not finished.

    A run that diverged is left as it is; with `until`, one whose log already holds that epoch too.
    """
    commands = []
    for seed in dict.fromkeys(seeds):  # one seed of everything first
        for row in rows:
            if seed not in row.runs:
                commands.append([*row.command(seed), "--save", str(folder), "--threads", str(threads), *more])
            elif read_result(row.runs[seed]) is None and \
                    not reached(row.runs[seed], until) and not is_diverged(row.runs[seed]):
                commands.append([f"{row.script}.py", "--resume", str(row.runs[seed]), "--threads", str(threads)])
    return commands


def reached(folder: Path | None, epoch: int | None) -> bool:
    """Whether the log of a run holds `epoch` and the run would go on after it: its last epoch ends with the test."""
    return folder is not None and epoch is not None and any(row["epoch"] >= epoch for row in epochs_of(folder)) \
        and read_config(folder)["options"]["epochs"]["value"] > epoch


class Job:
    """A run in a process of its own, which a terminal's Ctrl-C does not reach: it is stopped by `stop` alone."""

    def __init__(self, command: list[str]):
        self.command, self.asked = command, False
        # Files, not pipes, which nobody empties: a run that has much to warn of would wait for a reader for ever.
        self.output, self.errors = tempfile.NamedTemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen([sys.executable, *command], stdout=self.output, stderr=self.errors,
                                        start_new_session=True)

    def folder(self) -> Path | None:
        """The run's folder, as soon as the run has named it."""
        said = Path(self.output.name).read_text(encoding="utf-8", errors="replace")
        named = re.search(r"^(?:writing to|going on with) (.+)\n", said, flags=re.MULTILINE)
        return Path(named[1]) if named else None

    def stop(self) -> None:
        """Ask the run to save and stop.

        SIGTERM, because what a shell started in the background ignores SIGINT.
        """
        if not self.asked and self.process.poll() is None:
            self.asked = True
            self.process.terminate()

    def outcome(self) -> tuple[bool, str]:
        """Of a process that has ended: whether it failed, and how it went in words."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        self.output.close()
        self.errors.close()
        status = self.process.returncode
        if status == 0:
            return False, "done"
        if self.asked and status in (-signal.SIGTERM, 128 + signal.SIGTERM):  # any other: it could not save
            return False, "stopped"
        return True, f"FAILED ({lines[-1] if lines else f'status {status}'})"


def _interrupt(number, frame):
    raise KeyboardInterrupt


@when_asked_to_stop(_interrupt, "SIGTERM", "SIGHUP")
def run_all(commands: list[list[str]], jobs: int, until: int | None = None) -> int:
    """Run the commands, `jobs` at a time, in this folder; → how many failed.

    Each run is stopped, saved, once its log holds epoch `until`. Ctrl-C, SIGTERM and a closed terminal stop all.
    """
    waiting, running, failed, done = list(commands), [], 0, 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Job(waiting.pop(0)))
            time.sleep(0.2)
            for job in list(running):
                if job.process.poll() is not None:
                    running.remove(job)
                    done += 1
                    wrong, how = job.outcome()
                    failed += wrong
                    print(f"{done}/{len(commands)} {shlex.join(job.command)}: {how}", flush=True)
                elif until is not None and reached(job.folder(), until):
                    job.stop()
    except KeyboardInterrupt:
        print("stopping: every run saves first", flush=True)
        raise UserError("stopped; the same command goes on", 130) from None
    finally:
        for job in running:  # whatever ended this, a reader that went away as well: no run is left behind alone
            job.stop()
        for job in running:
            job.process.wait()
    return failed
