"""What a training loop sees of its run: the counted updates, reports, checkpoints, scores and the result.

It prints, moves the progress bar, and stops when a signal asks for it. What is written stands in `folder.py`.
"""

import contextlib
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.data import vocabulary_in
from common.errors import UserError, discard, printable, when_asked_to_stop
from common.orthogonal import largest_norm
from common.recurrence import unavailable_reason, unfit_reason
from common.runs.curves import draw_run
from common.runs.flags import AUTO, NETWORK, Args, Group, describe, unread
from common.runs.folder import Folder, check_stair, config_of, put_best
from common.runs.machine import (
    check_memory,
    device_name,
    git_commit,
    keep_freed_memory,
    memory_taken,
    prepare_machine,
    versions,
)
from common.runs.progress import Progress
from common.runs.records import is_diverged, is_not_finite, read_config, read_result, reason_of, save_tensors

AUTOSAVE_SECONDS = 60
DIVERGED = 3  # exit status of a run whose loss or weights are not finite: it would end so again
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # the last three: warnings of a scheduler


class Stopped(UserError):
    """The run was asked to stop, saved its state, and can go on."""


class Run:
    """A run of a script. Use as a context: Ctrl-C, SIGTERM and a closed terminal then save before they stop.

        with Run(options) as run:
            ...load the data, make the model...
            progress = run.track(Progress(update=0), model=model, optimizer=optimizer)
            for update in run.updates(progress, until=1500):
                ...one update; now and then run.report(...) and run.save_best()...
            run.finish({...})
    """

    def __init__(self, args: Args, label: str = ""):
        options = args.plain
        self.options, self.asked = options, args.asked
        self.device = prepare_machine(options.cuda, options.threads, options.tf32)
        if (reason := unavailable_reason(options.engine, self.device)) is not None:
            raise UserError(reason)
        self.folder = Folder(options, label)
        self.signal, self.why = None, ""  # the signal that asked to stop; its cause, where a line should name it
        self.bar = None
        self.reported = False             # since `checkpoint` was called last
        self.best_loaded = False
        self.started = time.monotonic()   # earlier by the time of the sessions before this one
        self.saved_at = -math.inf         # the first report makes the first checkpoint
        self.at_exit = contextlib.ExitStack()
        self.is_roomy = check_memory(options, self.device, *options.task.sizes(options))
        torch.manual_seed(args.random_seed)
        self.say(f"{options.script}: {options.row}", describe(options))

    def __enter__(self):
        self.at_exit.enter_context(when_asked_to_stop(self._ask_to_stop, *STOPPING))
        self.at_exit.callback(self.folder.close)
        return self

    def __exit__(self, *exception):
        self.at_exit.close()

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

    def updates(self, progress: Progress, until: int, counter: str = "update"):
        """Yields the number of each update that is left, 1 … `until`, and counts it in `progress` when it is done.

        Between updates the bar moves, a state worth keeping is saved (what was reported, at most once a minute), and
        the run stops if it was asked to.
        """
        done = self._place(progress, counter, until)
        if self.bar is None:
            self._open_bar(until, done, counter)
        if self.options.dry_run:
            yield from self._three_updates(done)
        for number in range(done + 1, until + 1):
            yield number
            setattr(progress, counter, number)
            if number == done + 1:
                self._leave_out_unread()
            self.advance()
            if self.reported:
                self.checkpoint(autosave=number < until or counter != "update")
            self.stop_if_asked()

    def epochs(self, progress: Progress, until: int, updates: int, save_every: int = 1, unit: str = "batch"):
        """Yields the number of each epoch that is left, each of so many `updates`; saves every `save_every` epochs."""
        done, stop = self._place(progress, "epoch", until), self.options.until_epoch
        self._open_bar(until * updates, done * updates + progress.batch, unit)
        for number in range(done + 1, until + 1):
            if stop is not None and number > stop:
                raise Stopped(f"stopped after epoch {number - 1}, saved; go on with {self.folder.resume_command()}", 0)
            yield number
            progress.epoch, progress.batch = number, 0
            self.checkpoint(autosave=number % save_every != 0 and number not in (stop, until))
            self.stop_if_asked()

    def _place(self, progress: Progress, counter: str, until: int) -> int:
        """Where the loop stands. Raises UserError for a checkpoint that says more than this run could have reached."""
        place = getattr(progress, counter)
        if place > until:
            raise UserError(f"{self.folder.path / 'last.pt'} stands at {counter} {place}, after the last one, {until}; "
                            "restore the one that belongs there or start a new run", 1)
        return place

    def _three_updates(self, done: int):
        """Yields four updates, the first of which sets things up; says how long a whole run takes, and stops."""
        yield done + 1
        self._leave_out_unread()
        started = time.monotonic()
        yield from range(done + 2, done + 5)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - started) / 3
        left = self.bar.total - self.bar.n
        taken = memory_taken(self.device)
        self.say(f"an update takes {seconds:.3g} s, the {left} updates of the run about {duration(seconds * left)}"
                 + (f"; this took {taken / 1e9:.2g} GB of memory" if taken else ""))
        sys.exit(0)

    def _leave_out_unread(self, group: Group | None = None) -> None:
        """Flags that the script has not read decide nothing: one line names them, and their origin is "not used"."""
        if names := unread(self.options, self.asked, group):
            self.say(f"{self.options.script}.py reads no {', '.join(f'args.{name}' for name in names)}: what stands "
                     "there decides nothing of this run")
        self.options.origin.update(dict.fromkeys(names, "not used"))

    def _open_bar(self, total: int, done: int, unit: str) -> None:
        """On a terminal only; there are plain lines otherwise."""
        self.bar = self.at_exit.enter_context(
            tqdm(total=total, initial=done, unit=unit, disable=not sys.stderr.isatty(), leave=False))

    def say(self, *lines: str) -> None:
        """Lines of output that do not tear the progress bar."""
        with self._output():
            for line in lines:
                line = printable(line, keep="\n")  # a foreign config.json sends nothing else to the terminal
                if self.bar is None or self.bar.disable:
                    print(line, flush=True)
                else:
                    self.bar.write(line)

    def advance(self) -> None:
        if self.bar is not None:
            with self._output():  # the terminal may be gone
                self.bar.update()

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

    def track(self, progress: Progress, data=None, **parts) -> Progress:
        """Name what a checkpoint holds (objects with a state_dict), and take hold of the folder. → `progress`.

        A new run's folder is made only here, when its data and its model are there; a resumed run is restored.
        `data` is the `common.data.Source` of what the run reads.
        """
        net, options, folder = parts["model"].network, self.options, self.folder
        if net.stair is not None:
            try:
                net.stair.forward(options.task.sizes(options)[0])    # no call: hooks see those of the loop
            except ValueError as error:  # it is too short
                raise UserError(str(error)) from None
            if (reason := unfit_reason(options.engine, net.hidden_size, net.stair, net.nonlinearity)) is not None:
                raise UserError(reason)
        self.parts, self.data = {"progress": progress, **parts}, data
        if self.is_roomy:
            keep_freed_memory()    # from here on: what loading the data has freed is given back
        self._leave_out_unread(NETWORK)
        if options.origin["net_type"] == "not used":    # the script names the cell itself
            options.row = type(net.cell or net).__name__
        config = None if folder.resumed else config_of(options, net, self.device, data)
        if options.resume == AUTO and not options.dry_run:
            folder.find_or_make(config)
        if data is not None:
            before = data.compare(read_config(folder.path).get("data")) if folder.resumed else ""
            self.say(*filter(None, (data.note, before)))
        if folder.resumed:
            check_stair(parts["model"], folder.path)
        if options.dry_run:
            self.say(f"{count_of(parts['model']):,} parameters; a run would be written to "
                     f"{folder.path or folder.place / folder.name_of(config)}")
            return progress
        if options.evaluate is not None:
            self.load_best()
            self.say(f"the best weights of {folder.path}", *folder.changes(self.device))
            return progress
        self.say(*folder.take(config))
        if folder.resumed:
            if folder.result() is None:
                if options.resume == AUTO and is_diverged(folder.path):
                    raise UserError(f"{folder.path} ended in a loss that is not finite, and would again", DIVERGED)
                if (seconds := folder.restore(self.parts)) is not None:
                    self.started, self.saved_at = self.started - seconds, time.monotonic()
                folder.begin_again()
            self.say(*folder.changes(self.device))
        self.say(f"{'going on with' if folder.resumed else 'writing to'} {folder.path}")
        return progress

    def scored(self, show, **scores) -> dict | None:
        """With --evaluate: measure and print the scores of the best weights. None without.

        show    (loss, accuracy) as text
        scores  {name: a function without arguments → (loss, accuracy)}; `test` is that of a finished run only
        """
        if self.options.evaluate is None:
            return None
        if read_result(self.folder.path) is None and scores.pop("test", None):
            self.say("the run is not finished: its test score is worked out once, at its end")
        found = {name: measure() for name, measure in scores.items()}
        self.say(*(f"{name}: {show(*score)}" for name, score in found.items()))
        return found

    def report(self, line: str, **row) -> None:
        """Print `line` and append `row` to log.csv; every row has the same columns.

        A loss that is not finite stops the run. The log keeps that row, so that the tables can tell a run that diverged
        from one that was interrupted; no checkpoint counts on it.
        """
        if self.options.dry_run:
            return
        cell, columns = self.parts["model"].network.cell, self.folder.columns
        if cell is not None and (columns is None or "orthogonality_error" in columns) \
                and (error := cell.orthogonality_error()) is not None:
            row["orthogonality_error"] = error
        row["seconds"] = round(self.seconds(), 2)
        self.folder.append(row)
        self.reported = True
        for name, value in row.items():
            if is_not_finite(name, value):
                raise self._diverged(f"the {name.replace('_', ' ')} is {value}")
        self.say(f"{line}  {self.seconds():.0f} s")

    def _diverged(self, what: str) -> UserError:
        saved = self.folder.path / "last.pt"
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
        self.folder.save(self.parts, self.seconds())
        self.saved_at = time.monotonic()

    def _check_weights(self) -> None:
        """Weights that are not finite never replace saved ones."""
        finite = [p.detach().isfinite().all() for p in self.parts["model"].parameters()]
        if not torch.stack(finite).all():
            raise self._diverged("a weight is not finite")

    def save_best(self) -> None:
        """The model's weights as they are now become best.pt."""
        if not self.options.dry_run:
            self._check_weights()
            save_tensors(self.folder.path / "best.pt", self.parts["model"].state_dict())

    def load_best(self) -> None:
        """Put the weights of best.pt into the model, at the end of a run."""
        self.best_loaded = True
        put_best(self.parts["model"], self.folder.path)

    def finish(self, result: dict) -> dict:
        """Write result.json, with which a run is finished, and draw its curves. → the whole result."""
        model, path = self.parts["model"], self.folder.path
        result = {**result, "row": self.options.row, "parameters": count_of(model),
                  "seconds": round(self.seconds(), 1), "device": device_name(self.device),
                  "engine": getattr(model.network, "engine_that_ran", None),    # None of an LSTM, which has its own
                  "threads": torch.get_num_threads(), "versions": versions(), "commit": git_commit(),
                  "command": read_config(path)["argv"], **({} if self.data is None else {"data": self.data.identity()})}
        self.folder.finish(result, model.network.stair)
        curves = f", curves in {path / 'curves.png'}" if self.options.curves and self._draw() else ""
        self.say(f"result in {path / 'result.json'}{curves}")
        return result

    def _draw(self) -> bool:
        """curves.png. One that cannot be drawn is a line: the result is there, and --resume draws it again."""
        try:
            draw_run(self.folder.path)
            return True
        except Stopped:
            raise
        except Exception as error:  # whatever fonts and formats raise
            why = str(error) if isinstance(error, UserError) else reason_of(error)
            self.say(f"curves.png could not be drawn: {why}")
            return False

    def finished(self) -> dict | None:
        """The result of a run that is already finished, else None."""
        if not self.folder.resumed or (found := self.folder.result()) is None:
            return None
        self.say(f"this run is finished; its result is in {self.folder.path / 'result.json'}")
        if self.options.curves and not (self.folder.path / "curves.png").exists():
            self._draw()
        return found


def count_of(model) -> int:
    """Numbers that a model learns."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def duration(seconds: float) -> str:
    """As in 40 s, 25 min, 9.5 h."""
    for unit, size, form in (("s", 1, ".0f"), ("min", 60, ".0f"), ("h", 3600, ".1f")):
        if seconds < 100 * size or unit == "h":
            return f"{seconds / size:{form}} {unit}"


def load_weights(model, folder: Path):
    """The model with the weights of the best validation of the run in `folder`, on the CPU, ready to evaluate."""
    check_stair(model, folder)
    put_best(model, folder)
    return model.eval()


def saved_vocabulary(folder: Path) -> list[str]:
    """The symbols of the text that a run of the characters was trained on, in the order of their numbers."""
    return vocabulary_in(read_config(folder).get("data"))
