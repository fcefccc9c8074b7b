"""What a training loop sees of its run: the counted updates, reports, checkpoints, scores and the result.

It prints, moves the progress bar, and stops when a signal asks for it. What is written stands in `folder.py`.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import UserError, discard, printable, when_asked_to_stop
from common.recurrence import unavailable_reason, unfit_reason
from common.runs.curves import draw_curves
from common.runs.flags import AUTO, NETWORK, Args, Group, describe, parse, unread
from common.runs.folder import Folder, check_stair, is_finite, load_best
from common.runs.machine import device_name, keep_freed_memory, memory_taken, prepare_machine
from common.runs.progress import Progress
from common.runs.provenance import VERSIONS, changes, config_of, foreign_code, git_commit
from common.runs.records import is_diverged, is_not_finite, log_rows, read_config, read_result, reading, reason_of

AUTOSAVE_SECONDS = 60
DIVERGED = 3  # exit status of a run whose loss or weights are not finite: it would end so again
SMALL = 2e9   # bytes; a run that takes less may keep freed memory, which takes up to twice as much
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # the last three: warnings of a scheduler
ONE_AT_A_TIME = threading.RLock()  # torch has one generator and one number of threads for all threads of a process


class Stopped(UserError):
    """The run was asked to stop, saved its state, and can go on."""


class Run:
    """A run of a script, as common/__init__.py shows its use. Within `with Run(args) as run:` Ctrl-C, SIGTERM and a
    closed terminal save before they stop. With --dry-run it is a `DryRun`.
    """

    def __new__(cls, args: Args, label: str = ""):
        return super().__new__(DryRun if args.options.dry_run else cls)

    def __init__(self, args: Args, label: str = ""):
        self.options, self.asked = args.options, args.asked
        self.asked.add("random_seed")
        self.folder = Folder(self.options, label)
        self.signal, self.why = None, ""  # the signal that asked to stop; its cause, where a line should name it
        self.bar = self.events = None
        self.reported = False             # since the last checkpoint
        self.trained = self.best_loaded = False
        self.started = time.monotonic()   # earlier by the time of the sessions before this one
        self.saved_at = -math.inf         # the first report makes the first checkpoint

    def __enter__(self):
        options = self.options
        with contextlib.ExitStack() as at_exit:
            at_exit.enter_context(ONE_AT_A_TIME)
            at_exit.callback(torch.set_num_threads, torch.get_num_threads())
            self.device = prepare_machine(options.cuda, options.threads, options.tf32)
            if (reason := unavailable_reason(options.engine, self.device)) is not None:
                raise UserError(reason)
            if options.tensorboard and find_spec("tensorboard") is None:
                raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out")
            torch.manual_seed(options.random_seed)
            self.say(f"{options.script}: {options.row}", describe(options))
            at_exit.enter_context(when_asked_to_stop(self._ask_to_stop, *STOPPING))
            at_exit.callback(self.folder.close)
            self.at_exit = at_exit.pop_all()
        return self

    def __exit__(self, *exception):
        return self.at_exit.__exit__(*exception)

    def _ask_to_stop(self, number, frame):
        if self.folder.lock is None:  # still loading data or making the model: there is nothing to save
            raise Stopped("stopped before the first update", 128 + number)
        if self.signal == number == signal.SIGINT:  # a person in a hurry does not wait for the update to end
            raise Stopped("stopped without saving; go on from the last checkpoint with "
                          f"{self.folder.resume_command()}", 128 + number)
        self.signal = number

    def stop_if_asked(self) -> None:
        """After an update: if a signal came, save and stop."""
        if self.signal is not None:
            if not self.best_loaded:  # else last.pt is of this moment already, and the weights are those of best.pt
                self.checkpoint()
            raise Stopped(f"stopped and saved{self.why}; go on with {self.folder.resume_command()}", 128 + self.signal)

    def begin(self, progress: Progress, *, steps: int = 1, data=None, memoryless=None, **parts) -> Progress:
        """Make the folder of a new run, whose data and model are there by now, or restore a run. → `progress`.

        steps        the length of the longest sequence, which the stair must reach
        data         the source of what the run reads, as `common.data` says, None where nothing is read
        memoryless   the loss of a model without memory, a line in the pictures; None where it is not known
        parts        what a checkpoint holds, by name: the model, the optimizer, and any other object with a state_dict
        """
        if self.options.evaluate is not None:
            raise UserError(f"{self.options.script}.py has no scores for --evaluate; leave it out")
        config, folder = self._check(progress, steps, data, parts), self.folder
        folder.open(config if memoryless is None else {**config, "memoryless_loss": memoryless})
        if folder.resumed:
            self._restore(config)
        self.say(f"{'going on with' if folder.resumed else 'writing to'} {folder.path}")
        return progress

    def _check(self, progress: Progress, steps: int, data, parts: dict) -> dict:
        """What can be wrong with a model and is known before its folder is made. → what config.json will say."""
        net, options = parts["model"].network, self.options
        if net.stair is not None:
            try:
                net.stair.forward(steps)    # no call: hooks see those of the loop
            except ValueError as error:  # it is too short
                raise UserError(str(error)) from None
            if (reason := unfit_reason(options.engine, net.hidden_size, net.stair, net.nonlinearity)) is not None:
                raise UserError(reason)
        for name, weight in parts["model"].named_parameters():
            if weight.dtype not in (torch.float32, torch.float64):
                raise UserError(f"{name} is {weight.dtype}, which no engine computes; use float32 or float64")
        self.parts, self.data, self.steps = {"progress": progress, **parts}, data, steps
        self._leave_out_unread(NETWORK)
        if options.origin["net_type"] == "not used":    # the script names the cell itself
            options.row = type(net.cell or net).__name__
        config = config_of(options, net, self.device, data)
        if files := foreign_code(config):
            self.say(f"edited: {', '.join(files)}; tables show this run apart from the published rows")
        if has_unsaved_schedule(parts.values()):
            self.say("a checkpoint does not hold the place of this learning-rate schedule, and --resume begins it "
                     "anew; train(..., schedule=...) saves it too")
        return config

    def _restore(self, now: dict) -> None:
        """Go on with a run; `now` is what config.json of a new run would say."""
        folder = self.folder
        self._tell_changes(folder.config, now)
        check_stair(self.parts["model"], folder.path, folder.config)
        if folder.result() is not None:
            return
        if self.options.resume == AUTO and is_diverged(folder.path):
            raise UserError(f"{folder.path} ended in a loss that is not finite, and would again", DIVERGED)
        if (seconds := folder.restore(self.parts)) is not None:
            self.started, self.saved_at = self.started - seconds, time.monotonic()
        folder.begin_again(now)

    def _tell_changes(self, config: dict, now: dict) -> None:
        """Lines for people: what has changed since the run of `config` was started. Raises UserError for other data."""
        if self.data is not None:
            digest, before = self.data["digest"], config.get("data")
            if not before:
                self.say(f"the record of this run names no data; it goes on with that in {self.data['path']}")
            elif (began_on := str(before.get("digest"))) != digest:
                raise UserError(f"this run was started on other data than {self.data['path']} holds (sha256 "
                                f"{began_on[:12]}…, now {digest[:12]}…); name the place of the same data or start a "
                                "new run", 1)
        if changed := ", ".join(changes(config, now)):
            self.say(f"not as it was started: {changed}; the numbers may differ")

    def _leave_out_unread(self, group: Group | None = None) -> None:
        """Flags that the script has not read decide nothing: a line names them, and their origin is "not used"."""
        if names := unread(self.options, self.asked, group):
            are, them, values = ("are", "them", "their values") if names[1:] else ("is", "it", "its value")
            never = f"{are} never used by this script, so {values} had no effect" if group else \
                f"{are} not used so far; where no later line uses {them}, {values} had no effect"
            self.say(f"{', '.join(f'args.{name}' for name in names)} {never}")
        self.options.origin.update(dict.fromkeys(names, "not used"))

    def updates(self, progress: Progress, until: int, counter: str = "update"):
        """Yields the number of each update that is left, 1 … `until`, and counts it in `progress` when it is done.

        Between updates the bar moves, a state worth keeping is saved (what was reported, at most once a minute), and
        the run stops if it was asked to.
        """
        done = getattr(progress, counter)
        if self.bar is None:
            self._open_bar(until, done, counter)
        for number in range(done + 1, until + 1):
            yield number
            setattr(progress, counter, number)
            if not self.trained:
                self._after_the_first_update()
            with self._output():  # the terminal may be gone
                self.bar.update()
            if self.reported:
                self.checkpoint(autosave=number < until or counter != "update")
            self.stop_if_asked()

    def epochs(self, progress: Progress, until: int, updates: int, save_every: int = 1, unit: str = "batch"):
        """Yields the number of each epoch that is left, each of so many `updates`; saves every `save_every` epochs."""
        done = progress.epoch
        self._open_bar(until * updates, done * updates + progress.batch, unit, updates)
        for number in range(done + 1, until + 1):
            yield number
            progress.epoch, progress.batch = number, 0
            self.checkpoint(autosave=number % save_every != 0 and number != until)
            self.stop_if_asked()

    def _after_the_first_update(self) -> None:
        self.trained = True
        self._leave_out_unread()
        if self.device.type == "cpu" and (memory_taken(self.device) or SMALL) < SMALL:
            keep_freed_memory()

    def _open_bar(self, total: int, done: int, unit: str, an_epoch: int | None = None) -> None:
        """On a terminal only; there are plain lines otherwise."""
        self.bar = self.at_exit.enter_context(
            tqdm(total=total, initial=done, unit=unit, disable=not sys.stderr.isatty(), leave=False))
        if self.options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here: most runs need no such package

            for earlier in self.folder.path.glob("events.out.tfevents.*"):  # a run that goes on has cut its log
                earlier.unlink()
            self.events, self.updates_of_an_epoch = SummaryWriter(self.folder.path), an_epoch
            self.at_exit.callback(self.events.close)
            self.events.add_text("options", describe(self.options).replace("\n", "  \n"))
            for row in log_rows(self.folder.path):
                self._add_events(row)

    def _add_events(self, row: dict) -> None:
        """A row of the log for TensorBoard, at the number of its update."""
        step = row["update"] if "update" in row else (row["epoch"] - 1) * self.updates_of_an_epoch + row["batch"]
        for name, value in row.items():
            if value is not None:
                self.events.add_scalar(name, value, int(step))
        self.events.flush()

    def say(self, *lines: str) -> None:
        """Lines of output that do not tear the progress bar."""
        with self._output():
            for line in lines:
                line = printable(line, keep="\n")  # a foreign config.json sends nothing else to the terminal
                if self.bar is None or self.bar.disable:
                    print(line, flush=True)
                else:
                    self.bar.write(line)

    @contextlib.contextmanager
    def _output(self):
        """An output that was closed asks the run to stop."""
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.why = f", because the output cannot be written ({error.strerror})"
            discard("stdout")
            self.signal = self.signal or getattr(signal, "SIGPIPE", signal.SIGTERM)

    def seconds(self) -> float:
        """Time spent on this run, sessions before this one included."""
        return time.monotonic() - self.started

    def report(self, line: str, **row) -> None:
        """Print `line` and append `row` to log.csv; every row has the same columns.

        A loss that is not finite stops the run. The log keeps that row, so that the tables can tell a run that diverged
        from one that was interrupted; no checkpoint counts on it.
        """
        cell = self.parts["model"].network.cell
        if cell and cell.rotation:
            row["orthogonality_error"] = cell.rotation.error()
        row["seconds"] = round(self.seconds(), 2)
        self.folder.append(row)
        self.reported = True
        if self.events:
            self._add_events(row)
        for name, value in row.items():
            if is_not_finite(name, value):
                raise self._diverged(f"the {name.replace('_', ' ')} is {value}")
        self.say(f"{line}  {self.seconds():.0f} s")

    def _diverged(self, what: str) -> UserError:
        saved = self.folder.path / "last.pt"
        where = f"the last good state is {saved}" if saved.exists() else "it came before the first checkpoint"
        return UserError(f"{what}: stopped; {where}. What usually helps: --clip 10, a lower --lr or --lr_orth, or "
                         "another start, --rinit henaff", DIVERGED)

    def checkpoint(self, autosave: bool = False) -> None:
        """Save last.pt; with `autosave` only if the last one is older than `AUTOSAVE_SECONDS`."""
        self.reported = False
        if autosave and time.monotonic() - self.saved_at < AUTOSAVE_SECONDS:
            return
        self._check_weights()
        self.folder.save(self.parts, self.seconds())
        self.saved_at = time.monotonic()

    def save_best(self) -> None:
        """The model's weights as they are now become best.pt."""
        self._check_weights()
        self.folder.save_best(self.parts["model"])

    def _check_weights(self) -> None:
        """Weights that are not finite never replace saved ones."""
        if not is_finite(self.parts["model"]):
            raise self._diverged("a weight is not finite")

    def load_best(self) -> None:
        """Put the weights of best.pt into the model, at the end of a run."""
        self.best_loaded = True
        load_best(self.parts["model"], self.folder.path, self.folder.config)

    def finish(self, result: dict) -> dict:
        """Write result.json, with which a run is finished, and draw its curves. → the whole result."""
        model, path, config = self.parts["model"], self.folder.path, self.folder.config
        result = {**result, "row": self.options.row, "parameters": count_of(model),
                  "seconds": round(self.seconds(), 1), "device": device_name(self.device),
                  "engine": getattr(model.network, "engine_that_ran", None),    # None of an LSTM, which has its own
                  "threads": torch.get_num_threads(), "versions": VERSIONS, "commit": git_commit(),
                  "command": config["argv"]}
        if self.data is not None:
            result["data"] = {name: self.data[name] for name in ("digest", "official")}
        stair = model.network.stair
        is_learned = stair is not None and count_of(stair) > 0
        self.folder.finish(result, stair.forward(self.steps) if is_learned else None)
        self.say(f"result in {path / 'result.json'}")
        self._draw(path / "curves.png")
        return result

    def _draw(self, path: Path) -> None:
        """Draw the curves where they are missing. If that fails, the result is there; --resume draws them again."""
        if not self.options.curves or path.exists():
            return
        try:
            draw_curves([path.parent], path)
            self.say(f"curves in {path}")
        except Stopped:
            raise
        except Exception as error:  # whatever fonts and formats raise
            self.say(f"curves.png could not be drawn: {reason_of(error)}")

    def finished(self) -> dict | None:
        """The result of a run that is already finished, else None."""
        if not self.folder.resumed or (found := self.folder.result()) is None:
            return None
        self.say(f"this run is finished; its result is in {self.folder.path / 'result.json'}")
        self._draw(self.folder.path / "curves.png")
        return found

    def evaluate(self, model, show, data=None, **scores) -> dict:
        """--evaluate: print and → the scores of the best weights of a run, {name: (loss, accuracy)}.

        show    (loss, accuracy) as text
        data    as in `begin`
        scores  {name: a function without arguments → (loss, accuracy)}; `test` is that of a finished run only
        """
        path = self.options.evaluate
        config, self.data, result = read_config(path), data, read_result(path)
        if result is None and not (path / "best.pt").exists():
            raise UserError(f"{path} has no best weights yet; they come with its first validation, or report", 1)
        self._tell_changes(config, config_of(self.options, model.network, self.device, data))
        load_best(model, path, config)
        self.say(f"the best weights of {path}")
        if result is None and scores.pop("test", None):
            self.say("the run is not finished: its test score is worked out once, at its end")
        found = {name: measure() for name, measure in scores.items()}
        self.say(*(f"{name}: {show(*score)}" for name, score in found.items()))
        return found


class Timed(Exception):
    """A dry run has seen what it was to see."""


class DryRun(Run):
    """--dry-run: every value, the size, and what the first updates take. Nothing is written."""

    def begin(self, progress: Progress, *, steps: int = 1, data=None, memoryless=None, **parts) -> Progress:
        config, self.options.tensorboard = self._check(progress, steps, data, parts), False
        self.at_exit.enter_context(contextlib.suppress(Timed))
        path = self.folder.path or self.folder.place_for(config)[0]
        self.say(f"{count_of(parts['model']):,} parameters; a run would be written to {path}")
        return progress

    def updates(self, progress: Progress, until: int, counter: str = "update"):
        """Yields four updates, or all where there are fewer. The first one sets things up and is not timed."""
        if self.bar is None:
            self._open_bar(until, 0, counter)
        for number in range(1, min(4, until) + 1):
            if number < 3:
                started, first = time.monotonic(), number
            yield number
            if not self.trained:
                self._after_the_first_update()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        seconds, taken = (time.monotonic() - started) / (number - first + 1), memory_taken(self.device)
        memory = f"; this took {taken / 1e9:.2g} GB of memory" if taken else ""
        self.say(f"an update takes {seconds:.3g} s, the {self.bar.total} updates of the run about "
                 f"{timedelta(seconds=round(seconds * self.bar.total))} h:min:s{memory}")
        raise Timed

    def report(self, line: str, **row) -> None:
        """A dry run has nothing to report."""

    def save_best(self) -> None:
        """A dry run saves nothing."""


def has_unsaved_schedule(parts) -> bool:
    """Whether a scheduler of torch steps the rates of an optimizer among `parts`, and is no part itself."""
    is_scheduled = any("initial_lr" in group for part in parts for group in getattr(part, "param_groups", ()))
    return is_scheduled and not any(isinstance(part, torch.optim.lr_scheduler.LRScheduler) for part in parts)


def count_of(model) -> int:
    """Numbers that a model learns."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def best_model(build, args: Args, folder: Path):
    """The model that `build` makes, with the best weights of the run in `folder`, on the CPU and ready to evaluate."""
    config = read_config(folder)
    data = config.get("data") or {}
    with reading(Path(folder) / "config.json"):  # that of an earlier version may not hold what `build` needs
        model = build(args, **{name: data[name] for name in ("vocabulary", "classes") if name in data})
    load_best(model, folder, config)
    return model.eval()


def loader(build, script: str, defaults: dict, paper: dict):
    """The `load` of a script: load(FOLDER) → (the `best_model` of a run, its options)."""
    def load(folder: Path) -> tuple:
        args = parse(["--resume", folder], script, "", defaults, paper)
        return best_model(build, args, folder), args

    return load
