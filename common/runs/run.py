"""A run on disk: its folder, its log, its checkpoints, how it stops and how it goes on.

    saves/copytask_nvar/expRNN-expn-s400/
      config.json   every resolved value and its origin, argv, versions, device, git commit
      log.csv       a row per report
      last.pt       everything that `--resume` needs;  best.pt  the weights of the best validation
      curves.png    drawn from log.csv
      stair.csv     the numbers α_t of a learned stair, of the weights that the result is about
      result.json   written last: its presence means finished

Every file but the log is written under a temporary name, flushed to the disk and renamed, so it is whole or
not there. The log is appended to; a checkpoint knows how long the log was, and resuming cuts it there. So a
run killed at any moment goes on from its last checkpoint as if nothing had happened, bit for bit.
"""

import contextlib
import csv
import errno
import io
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.data import vocabulary_in
from common.errors import UserError, close_output, printable, when_asked_to_stop
from common.optim import METHODS
from common.orthogonal import largest_norm
from common.recurrence import unavailable_reason, unfit_reason
from common.runs.curves import draw_run
from common.runs.flags import AUTO, MAY_GROW_ON_RESUME, Options, describe, science
from common.runs.machine import check_memory, device_name, edited_files, git_commit, prepare_machine, versions
from common.runs.records import (
    check_like,
    is_diverged,
    is_not_finite,
    load_tensors,
    log_rows,
    plain,
    plain_file,
    read_config,
    read_result,
    reason_of,
    save_tensors,
    write_atomically,
    write_json,
)

AUTOSAVE_SECONDS = 60
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of a network's file system
DIVERGED = 3  # exit status of a run whose loss or weights are not finite: it would end so again
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # the last three: warnings of a scheduler
WRONG_CONTENT = (LookupError, TypeError, ValueError, RuntimeError, AttributeError,  # of a checkpoint of something else
                 ArithmeticError)


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────


class Progress:
    """Where a loop stands: numbers and tensors as attributes, all of them saved in a checkpoint."""

    def __init__(self, **start):
        self.__dict__.update(start)

    def state_dict(self) -> dict:
        return {name: value.values if isinstance(value, Recent) else value for name, value in self.__dict__.items()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for the state of another loop."""
        state = {name: self.__dict__[name].fill_up(new) if isinstance(self.__dict__.get(name), Recent) else new
                 for name, new in state.items()}
        check_like(self.state_dict(), state, "its place")
        for name, new in state.items():
            if torch.is_tensor(new):
                self.state_dict()[name].copy_(new)   # in place: a meter shares it
            else:
                self.__dict__[name] = new


class Meter:
    """Means over the examples since the last report. The sums stay on the device, so no update waits for a number."""

    def __init__(self, *names: str, device):
        self.names, self.sums = names, torch.zeros(len(names) + 1, device=device)  # the last: how many examples

    @torch.no_grad()
    def add(self, *sums: torch.Tensor, count: int) -> None:
        """Of one batch: a sum over its `count` examples for each name."""
        self.sums += torch.stack((*sums, torch.full_like(sums[0], count)))

    def take(self) -> dict[str, float]:
        """{name: mean since the last call}."""
        *sums, count = self.sums.tolist()
        self.sums.zero_()
        return {name: total / count for name, total in zip(self.names, sums, strict=True)}


class Recent:
    """The values of the last `keep` updates, one by one and on the device: for medians, and for a mean at the end."""

    def __init__(self, *names: str, keep: int, device):
        self.values = torch.zeros(keep, len(names), device=device)

    @torch.no_grad()
    def add(self, update: int, *values: torch.Tensor) -> None:
        """The values of update 1, 2, …; they take the place of those `keep` updates before."""
        self.values[(update - 1) % self.values.shape[0]] = torch.stack(values)

    def rows(self, update: int, last: int) -> torch.Tensor:
        """The values of the `last` updates up to `update` → (last, names)."""
        return self.values[torch.arange(update - last, update) % len(self.values)]

    def fill_up(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of a run of fewer updates, which kept fewer values and overwrote none → (keep, names)."""
        if torch.is_tensor(values) and values.shape[1:] == self.values.shape[1:] and len(values) < len(self.values):
            return torch.cat((values, self.values[len(values):]))
        return values


class Stopped(UserError):
    """The run was asked to stop, saved its state, and can go on."""


class Run:
    """The folder of one run. Use as a context: Ctrl-C, SIGTERM and a closed terminal then save before they stop.

        with Run(options, label="expRNN-expn") as run:
            ...load the data, make the model...
            progress = run.track(Progress(update=0), model=model, optimizer=optimizer)
            for update in run.updates(progress, until=1500):
                ...one update; now and then run.report(...) and run.save_best()...
            run.finish({...})
    """

    def __init__(self, options: Options, label: str):
        self.options = options
        self.device = prepare_machine(options.cuda, options.threads, options.tf32)
        if (reason := unavailable_reason(options.engine, self.device)) is not None:
            raise UserError(reason)
        self.auto = options.resume == AUTO
        self.resumed = options.resume is not None and not self.auto
        self.signal, self.why = None, ""  # the signal that asked to stop; its cause, where a line should name it
        self.bar = None
        self.reported = False  # since the last update
        self.best_loaded = False
        self.lock = None
        self.parts: dict = {}
        self.log_size, self.columns, self.engine_before = 0, None, None
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.saved_at = -math.inf         # the first report makes the first checkpoint
        self.folder, self.label = options.resume if self.resumed else None, label
        self.memory = check_memory(options, self.device, *options.task.sizes(options))
        torch.manual_seed(options.random_seed)
        self.say(f"{options.script}: {options.row}")
        self.say(describe(options))

    def _place(self) -> Path:
        return Path(self.options.save) / self.options.script

    def _stem(self) -> str:
        """The folder's name; a second run of it gets -2."""
        options = self.options
        return f"{self.label}-s{options.random_seed}" + (f"-{options.name}" if options.name else "")

    def _names(self):
        """The folder that this run is called, then that with -2, -3, … Raises UserError after the last."""
        parent, stem = self._place(), self._stem()
        yield parent / stem
        for number in range(2, 10_000):
            yield parent / f"{stem}-{number}"
        raise UserError(f"{parent} already holds 9,999 runs called {stem}; choose a --name or another --save")

    def _no_folder(self, error: OSError) -> UserError:
        return UserError(f"no folder could be made in {self._place()} ({error.strerror}); "
                         "choose another place with --save")

    def _new_folder(self) -> Path:
        try:
            self._place().mkdir(parents=True, exist_ok=True)
            for folder in self._names():
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    return folder
        except OSError as error:
            raise self._no_folder(error) from None

    def _found_or_made(self, config: dict) -> tuple[Path, bool]:
        """The folder of the run with these very options → (folder, whether it was there).

        A new one is prepared aside and appears under its name with its config.json in it, so that of two processes
        with the same command one makes it and the other finds it.
        """
        made = Path(self.options.save) / f".{self._stem()}.{os.getpid()}.{time.time_ns()}"
        try:
            self._place().mkdir(parents=True, exist_ok=True)
            made.mkdir()
            write_json(made / "config.json", config)
            for folder in self._names():
                try:
                    os.rename(made, folder)
                    return folder, False
                except OSError:
                    if not folder.is_dir():
                        raise
                if is_same_run(read_config(folder), config):
                    return folder, True
        except OSError as error:
            raise self._no_folder(error) from None
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _config(self) -> dict:
        options, stair = self.options, getattr(self.parts["model"].network, "stair", None)
        values = {dest: {"value": plain(getattr(options, dest)), "origin": source}
                  for dest, source in options.origin.items()}
        return {"script": options.script, "task": options.task.NAME, "revision": options.task.REVISION,
                "row": options.row, "argv": sys.argv, "options": values, "stair": type(stair).__name__,
                "edited_files": edited_files(options.script), "versions": versions(),
                "device": device_name(self.device), "threads": torch.get_num_threads(), "commit": git_commit(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}

    def _lock(self) -> None:
        """Keep a second process out of the folder for as long as this one works on it."""
        try:
            import fcntl
        except ImportError:  # Windows has no flock; there the folder is not guarded
            return
        try:
            self.lock = open(self.folder / ".lock", "a", opener=plain_file)  # noqa: SIM115 (held until __exit__)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working on {self.folder}; wait for it or stop it first", 1) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return self.say(f"the file system of {self.folder} has no locks ({error.strerror}): see to it that no "
                                "second process works on this run")
            raise UserError(f"{self.folder} cannot be written to ({error.strerror})", 1) from None

    def __enter__(self):
        self._signals = contextlib.ExitStack()
        self._signals.enter_context(when_asked_to_stop(self._ask_to_stop, *STOPPING))
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()
        if self.lock is not None:
            self.lock.close()
        self._signals.close()
        return False

    def _ask_to_stop(self, number, frame):
        if self.lock is None:  # still loading data or making the model: there is nothing to save
            raise Stopped("stopped before the first update", 128 + number)
        if self.signal == number == signal.SIGINT:  # a person in a hurry does not wait for the update to end
            raise Stopped(f"stopped without saving; go on from the last checkpoint with {self.resume_command()}",
                          128 + number)
        self.signal = number

    def resume_command(self) -> str:
        typed = sys.argv[0] if Path(sys.argv[0]).stem == self.options.script else f"{self.options.script}.py"
        return f"python {typed} --resume {self.folder}"

    def stop_if_asked(self) -> None:
        """After an update: if a signal came, save and stop."""
        if self.signal is not None:
            if not self.best_loaded:  # else last.pt is of this moment already, and the weights are those of best.pt
                self.checkpoint()
            raise Stopped(f"stopped and saved{self.why}; go on with {self.resume_command()}", 128 + self.signal)

    # ── the loop ──

    def updates(self, progress: Progress, until: int, counter: str = "update"):
        """Yields the number of each update that is left, 1 … `until`, and counts it in `progress` when it is done.

        Between updates the bar moves, a state worth keeping is saved (what was reported, at most once a minute), and
        the run stops if it was asked to.
        """
        self._check_place(getattr(progress, counter), until, counter)
        if self.bar is None:
            self._open_bar(until, getattr(progress, counter), counter)
        if self.options.dry_run:
            yield from self._three_updates(getattr(progress, counter))
        while (number := getattr(progress, counter) + 1) <= until:
            yield number
            setattr(progress, counter, number)
            self.advance()
            if self.reported:
                self.checkpoint(autosave=number < until or counter != "update")
            self.stop_if_asked()

    def epochs(self, progress: Progress, until: int, updates: int, save_every: int = 1, unit: str = "batch"):
        """Yields the number of each epoch that is left, each of so many `updates`; saves every `save_every` epochs."""
        self._check_place(progress.epoch, until, "epoch")
        self._open_bar(until * updates, progress.epoch * updates + progress.batch, unit)
        stop = self.options.until_epoch
        while (number := progress.epoch + 1) <= until:
            if stop is not None and progress.epoch >= stop:
                raise Stopped(f"stopped after epoch {progress.epoch}, saved; go on with {self.resume_command()}", 0)
            yield number
            progress.epoch, progress.batch = number, 0
            self.checkpoint(autosave=number % save_every != 0 and number not in (stop, until))
            self.stop_if_asked()

    def _check_place(self, place: int, until: int, counter: str) -> None:
        """Raises UserError for a checkpoint that says more than this run could have reached."""
        if place > until:
            raise UserError(f"{self.folder / 'last.pt'} stands at {counter} {place}, after the last one, {until}; "
                            "restore the one that belongs there or start a new run", 1)

    def _three_updates(self, done: int):
        """Yields four updates, the first of which sets things up; says how long a whole run takes, and stops."""
        yield done + 1
        started = time.monotonic()
        yield from range(done + 2, done + 5)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - started) / 3
        left = self.bar.total - self.bar.n
        self.say(f"an update takes {seconds:.3g} s, the {left} updates of the run about {duration(seconds * left)}")
        sys.exit(0)

    def _open_bar(self, total: int, done: int, unit: str) -> None:
        """On a terminal only; there are plain lines otherwise."""
        self.bar = tqdm(total=total, initial=done, unit=unit, disable=not sys.stderr.isatty(), leave=False)

    # ── what people see ──

    def say(self, line: str) -> None:
        """A line of output that does not tear the progress bar. An output that was closed asks the run to stop."""
        line = printable(line, keep="\n")  # a foreign config.json sends nothing else to the terminal
        try:
            if self.bar is not None and not self.bar.disable:
                self.bar.write(line)
            else:
                print(line, flush=True)
        except OSError as error:
            self._nobody_reads(error)

    def _nobody_reads(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.why = f", because the output cannot be written ({error.strerror})"
        close_output()
        self.signal = self.signal or getattr(signal, "SIGPIPE", signal.SIGTERM)

    def advance(self) -> None:
        if self.bar is not None:
            try:
                self.bar.update()
            except OSError as error:  # the terminal is gone
                self._nobody_reads(error)

    def seconds(self) -> float:
        """Time spent on this run, sessions before this one included."""
        return self.seconds_before + time.monotonic() - self.started

    # ── what is saved ──

    def track(self, progress: Progress, data=None, **parts) -> Progress:
        """Name what a checkpoint holds (objects with a state_dict), and take hold of the folder. → `progress`.

        A new run's folder is made only here, when its data and its model are there; a resumed run is restored.
        `data` is the `common.data.Source` of what the run reads.
        """
        net, engine = parts["model"].network, self.options.engine
        if hasattr(net, "stair") and (reason := unfit_reason(engine, net.hidden_size, net.stair, net.nonlinearity)):
            raise UserError(reason)
        self.parts = {"progress": progress, **parts}
        config = None if self.resumed else {**self._config(), **({} if data is None else {"data": data.record()})}
        if self.auto and not self.options.dry_run:
            self.folder, self.resumed = self._found_or_made(config)
        self._look_at(data)
        if self.resumed:
            check_stair(self.parts["model"], self.folder)
        if self.options.dry_run:
            self.say(f"{count_of(self.parts['model']):,} parameters, about {self.memory / 1e9:.2g} GB of memory; "
                     f"a run would be written to {self._place() / self._stem()}")
            return progress
        if self.options.evaluate is not None:
            self.load_best()
            self.say(f"the best weights of {self.folder}")
            self._say_what_changed()
            return progress
        if not self.resumed and not self.auto:
            self.folder = self._new_folder()
        self._lock()
        if self.resumed:
            self._clear()
            if self._result() is None:
                if self.auto and is_diverged(self.folder):
                    raise UserError(f"{self.folder} ended in a loss that is not finite, and would again", DIVERGED)
                self._restore()
                self._begin_again()
            self._say_what_changed()
        elif not self.auto:
            write_json(self.folder / "config.json", config)
        self.say(f"{'going on with' if self.resumed else 'writing to'} {self.folder}")
        return progress

    def scored(self, show, **scores) -> dict | None:
        """With --evaluate: measure and print the scores of the best weights. None without.

        show    (loss, accuracy) as text
        scores  {name: a function without arguments → (loss, accuracy)}; `test` is that of a finished run only
        """
        if self.options.evaluate is None:
            return None
        if read_result(self.folder) is None and scores.pop("test", None):
            self.say("the run is not finished: its test score is worked out once, at its end")
        found = {name: measure() for name, measure in scores.items()}
        for name, score in found.items():
            self.say(f"{name}: {show(*score)}")
        return found

    def _look_at(self, data) -> None:
        """Print what is noteworthy about the data. Raises UserError when the run was started on other data."""
        self.data = data
        if data is not None:
            before = data.compare(read_config(self.folder).get("data")) if self.resumed else ""
            for line in filter(None, (data.note, before)):
                self.say(line)

    def _clear(self) -> None:
        """Remove what a killed process was writing."""
        for temporary in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _say_what_changed(self) -> None:
        """A line where the machine is not the one that the run was started on."""
        config = read_config(self.folder)
        before = {**(config.get("versions") or {}), "device": config.get("device"), "commit": config.get("commit")}
        now = {**versions(), "device": device_name(self.device), "commit": git_commit()}
        changed = [f"{name} {before[name]} → {now[name]}" for name in now if before.get(name) not in (None, now[name])]
        if changed:
            self.say(f"not as it was started: {', '.join(changed)}; the last digits may differ")
        then, now = config.get("edited_files", []), edited_files(config["script"])
        if then != now:
            self.say(f"edited files when it was started: {', '.join(then) or 'none'}; now: {', '.join(now) or 'none'}; "
                     "the numbers may be others")

    def _restore(self) -> None:
        last = self.folder / "last.pt"
        if not os.path.lexists(last):  # killed before the first checkpoint: from the beginning, as the first time
            if read_result(self.folder) is not None:
                raise UserError(f"{last} is missing, from which a finished run goes on; restore it from a copy or "
                                "start a new run", 1)
            if read_config(self.folder).get("revision", 1) != self.options.task.REVISION:
                raise UserError(f"{self.folder} has no checkpoint, and the same options compute something else since "
                                "it was started (CHANGES.md); start a new run")
            self._cut_log(0)
            return
        state = load_tensors(last, self.device)
        try:
            check_like({"seconds": 0.0, "log_size": 0}, {name: state[name] for name in ("seconds", "log_size")})
            for name, part in self.parts.items():
                if isinstance(part, torch.nn.Module):
                    check_like(part.state_dict(), state["parts"][name])
                elif isinstance(part, torch.optim.Optimizer):
                    state["parts"][name] = checked_optimizer(part, state["parts"][name])
                part.load_state_dict(state["parts"][name])
            torch.set_rng_state(state["rng"].cpu())
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
            self.seconds_before = float(state["seconds"])
            if not isinstance(engine := state.get("engine"), str | None):
                raise ValueError(f"its engine is {str(engine)[:40]}")
            self.engine_before = engine  # of a session whose last update was the run's last
            self._cut_log(state["log_size"], state["columns"])
        except WRONG_CONTENT as error:
            raise foreign(last, error) from None
        self.saved_at = time.monotonic()

    def _cut_log(self, size: int, columns: list[str] | None = None) -> None:
        """Go on after the first `size` bytes of the log, a table of `columns`. Raises ValueError for another table."""
        log = self.folder / "log.csv"
        shorter = UserError(f"{log} is shorter than when the checkpoint was saved; restore it from a copy or start a "
                            "new run", 1)
        try:
            with open(log, "r+b", opener=plain_file) as file:
                found = file.seek(0, os.SEEK_END)
                if found < size:
                    raise shorter
                rows = log_rows(self.folder, size)
                if columns != (list(rows[0]) if rows else None):
                    raise ValueError(f"its log has the columns {str(columns)[:40]}")
                if found > size:
                    os.truncate(file.fileno(), size)
        except FileNotFoundError:
            if size:
                raise shorter from None
        except OSError as error:
            raise self._unwritable(log, error) from None
        self.log_size, self.columns = size, columns

    def _begin_again(self) -> None:
        """Write the number of updates or epochs, where more were typed, to config.json, and delete the old result."""
        config = read_config(self.folder)
        for name in set(MAY_GROW_ON_RESUME) & self.options.origin.keys():
            entry = {"value": getattr(self.options, name), "origin": self.options.origin[name]}
            if config["options"][name]["value"] != entry["value"]:
                config["options"][name] = entry
                write_json(self.folder / "config.json", config)
        for name in ("result.json", "curves.png"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def _unwritable(self, path: Path, error: OSError) -> UserError:
        return UserError(f"{path} could not be written ({error.strerror}); free the disk or its permissions, "
                         f"then go on with {self.resume_command()}", 1)

    def report(self, line: str, **row) -> None:
        """Print `line` and append `row` to log.csv; every row has the same columns.

        A loss that is not finite stops the run. The log keeps that row, so that the tables can tell a run that diverged
        from one that was interrupted; no checkpoint counts on it.
        """
        if self.options.dry_run:
            return
        cell = getattr(self.parts["model"].network, "cell", None)
        if cell is not None and (self.columns is None or "orthogonality_error" in self.columns) \
                and (error := cell.orthogonality_error()) is not None:
            row["orthogonality_error"] = error
        row["seconds"] = round(self.seconds(), 2)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if self.columns is None:
            self.columns = list(row)
            writer.writerow(self.columns)
        if missing := set(self.columns) - row.keys():
            raise UserError(f"{self.folder / 'log.csv'} has a column {min(missing)}, which this version does not "
                            "write; go on with the version that started this run", 1)
        writer.writerow(_cell(row[column]) for column in self.columns)
        content = text.getvalue().encode()
        try:
            with open(self.folder / "log.csv", "ab", opener=plain_file) as file:
                found = file.seek(0, os.SEEK_END)
                if found == self.log_size:
                    file.write(content)
        except OSError as error:
            raise self._unwritable(self.folder / "log.csv", error) from None
        if found != self.log_size:
            raise UserError(f"{self.folder / 'log.csv'} was changed by another program while the run went on; stop "
                            f"that one, then go on with {self.resume_command()}", 1)
        self.log_size += len(content)
        self.reported = True
        for name, value in row.items():
            if is_not_finite(name, value):
                raise self._diverged(f"the {name.replace('_', ' ')} is {value}")
        self.say(f"{line}  {self.seconds():.0f} s")

    def _diverged(self, what: str) -> UserError:
        saved = self.folder / "last.pt"
        where = f"the last good state is {saved}" if saved.exists() else "it came before the first checkpoint"
        lower = "--lr" if self.options.origin.get("lr_orth") == "not used" else "--lr and --lr_orth"
        helps = [*(["--clip 10"] if not self.options.clip else []), f"a lower {lower}"]
        if self.options.net_type in ("RNN", "RNN-Orth", "expRNN") and self.options.rinit != "henaff":
            helps.append("another start, --rinit henaff")        # nnRNN starts at W = Λ from any
        gpu = "" if lower == "--lr" or self.device.type == "cpu" else \
            f"; on a GPU exp(S) is also lost where the norm of S has passed {largest_norm():.0f}, which a lower " \
            "--lr_orth keeps smaller and a run without --cuda bears"
        return UserError(f"{what}: stopped; {where}. What usually helps: {' or '.join(helps)}{gpu}", DIVERGED)

    def checkpoint(self, autosave: bool = False) -> None:
        """Save last.pt; with `autosave` only if the last one is older than `AUTOSAVE_SECONDS`."""
        if self.options.dry_run:
            return
        self.reported = False
        if autosave and time.monotonic() - self.saved_at < AUTOSAVE_SECONDS:
            return
        self._check_weights()
        log = self.folder / "log.csv"
        try:
            if self.log_size:  # what the checkpoint counts on must be on the disk before it
                with open(log, "rb", opener=plain_file) as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(log, error) from None
        save_tensors(self.folder / "last.pt", {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "seconds": self.seconds(), "columns": self.columns, "log_size": self.log_size, "engine": self._engine()})
        self.saved_at = time.monotonic()

    def _engine(self) -> str | None:
        """The engine that ran the last update; None of an LSTM, which has its own."""
        return getattr(self.parts["model"].network, "engine_that_ran", self.engine_before)

    def _check_weights(self) -> None:
        """Weights that are not finite never replace saved ones."""
        finite = [p.detach().isfinite().all() for p in self.parts["model"].parameters()]
        if not torch.stack(finite).all():
            raise self._diverged("a weight is not finite")

    def save_best(self) -> None:
        """The model's weights as they are now become best.pt."""
        if self.options.dry_run:
            return
        self._check_weights()
        save_tensors(self.folder / "best.pt", self.parts["model"].state_dict())

    def load_best(self) -> None:
        """Put the weights of best.pt into the model, at the end of a run."""
        self.best_loaded = True
        put_best(self.parts["model"], self.folder, self.device)

    def finish(self, result: dict) -> dict:
        """Write result.json, with which a run is finished, and draw its curves. → the whole result."""
        result = {**result, "row": self.options.row, "parameters": count_of(self.parts["model"]),
                  "seconds": round(self.seconds(), 1), "device": device_name(self.device),
                  "engine": self._engine(),
                  "threads": torch.get_num_threads(),
                  "versions": versions(), "commit": git_commit(),
                  "command": read_config(self.folder)["argv"]}
        if self.data is not None:
            result["data"] = self.data.identity()
        self._write_stair()
        write_json(self.folder / "result.json", result)
        curves = f", curves in {self.folder / 'curves.png'}" if self.options.curves and self._draw() else ""
        self.say(f"result in {self.folder / 'result.json'}{curves}")
        return result

    def _draw(self) -> bool:
        """curves.png. One that cannot be drawn is a line: the result is there, and --resume draws it again."""
        try:
            draw_run(self.folder)
            return True
        except Stopped:
            raise
        except Exception as error:  # whatever fonts and formats raise
            why = str(error) if isinstance(error, UserError) else reason_of(error)
            self.say(f"curves.png could not be drawn: {why}")
            return False

    def _write_stair(self) -> None:
        """stair.csv: t and α_t of a learned stair with one number a step."""
        numbers = getattr(getattr(self.parts["model"].network, "stair", None), "numbers", None)
        if isinstance(numbers, torch.nn.Parameter) and numbers.ndim == 1:
            lines = ["t,alpha", *(f"{t},{value:.7g}" for t, value in enumerate(numbers.flatten().tolist()))]
            write_atomically(self.folder / "stair.csv", ("\n".join(lines) + "\n").encode())

    def finished(self) -> dict | None:
        """The result of a run that is already finished, else None."""
        if not self.resumed or (found := self._result()) is None:
            return None
        self.say(f"this run is finished; its result is in {self.folder / 'result.json'}")
        if self.options.curves and not (self.folder / "curves.png").exists():
            self._draw()
        return found

    def _result(self) -> dict | None:
        """result.json, if it has all the updates or epochs that this run is to have."""
        found = read_result(self.folder)
        wanted = {name: getattr(self.options, name) for name in MAY_GROW_ON_RESUME if name in self.options.origin}
        if found is None or any(found.get(name, number) < number for name, number in wanted.items()):
            return None
        return found


def _cell(value) -> str:
    """A number of the log with the digits that a float32 has; an empty cell for None."""
    return "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)


def count_of(model) -> int:
    """Numbers that a model learns."""
    return sum(p.numel() for p in model.parameters())


def checked_optimizer(optimizer, state: dict) -> dict:
    """The `state` of a checkpoint as `optimizer` loads it: its own settings, with the rates and averages of `state`.

    Raises ValueError or LookupError where it is not the state of such an optimizer.
    """
    own, groups, kept = optimizer.state_dict(), [], set()
    for mine, theirs in zip(own["param_groups"], state["param_groups"], strict=True):
        check_like(mine, theirs, "its optimizer")
        if not 0 <= theirs["lr"] <= mine["lr"] or theirs["params"] != mine["params"]:
            raise ValueError(f"its lr is {theirs['lr']}")
        groups.append({**mine, "lr": float(theirs["lr"])})
    parameters = [(p, group["method"]) for group in optimizer.param_groups for p in group["params"]]
    for index, gathered in state["state"].items():
        parameter, method = parameters[index]
        check_like({name: 0 if name == "step" else parameter.detach() for name in METHODS[method]}, gathered,
                   "its optimizer")
        kept.add(index)
    if kept and len(kept) < len(parameters):
        raise ValueError("its optimizer leaves a parameter out")
    return {"state": state["state"], "param_groups": groups}


def duration(seconds: float) -> str:
    """As in 40 s, 25 min, 9.5 h."""
    for unit, size, form in (("s", 1, ".0f"), ("min", 60, ".0f"), ("h", 3600, ".1f")):
        if seconds < 100 * size or unit == "h":
            return f"{seconds / size:{form}} {unit}"


def foreign(path: Path, error: Exception) -> UserError:
    """The sentence for a checkpoint in a run's folder that is of another model."""
    return UserError(f"{path} is not a checkpoint of the model that {path.parent / 'config.json'} describes "
                     f"({reason_of(error)}); restore the one that belongs there or start a new run", 1)


def put_best(model, folder: Path, device="cpu") -> None:
    """Put the weights of the best validation of the run in `folder` into the model."""
    best = Path(folder) / "best.pt"
    try:
        model.load_state_dict(load_tensors(best, device))
    except WRONG_CONTENT as error:
        raise foreign(best, error) from None


def check_stair(model, folder: Path) -> None:
    """Raises UserError where the model has another stair than the run in `folder`: weights alone do not tell."""
    before, now = read_config(folder).get("stair"), type(getattr(model.network, "stair", None)).__name__
    if before not in (None, now):
        raise UserError(f"{folder} is a run with the stair {before}, and the script now builds {now}; restore the line "
                        "that builds the stair, or start a new run")


def load_weights(model, folder: Path):
    """The model with the weights of the best validation of the run in `folder`, on the CPU, ready to evaluate."""
    check_stair(model, folder)
    put_best(model, folder)
    return model.eval()


def saved_vocabulary(folder: Path) -> list[str]:
    """The symbols of the text that a run of the characters was trained on, in the order of their numbers."""
    return vocabulary_in(read_config(folder).get("data"))


def is_same_run(found: dict, wanted: dict) -> bool:
    """Whether two config.json are of the same computation: values, the task's revision and the stair's class."""
    def key(config):
        return (science(config["options"]), config.get("revision", 1),
                config.get("stair", wanted.get("stair")))
    return key(found) == key(wanted)
