"""The folder of one run on the disk, while a process works on it.

    saves/copytask_nvar/expRNN-expn-s400/
      config.json   every resolved value and its origin, argv, code by content, versions, device
      log.csv       a row per report
      last.pt       everything that `--resume` needs;  best.pt  the weights of the best validation
      curves.png    drawn from log.csv
      stair.csv     the numbers of a learned stair, of the weights that the result is about
      result.json   written last: its presence means finished

Every file but the log is written under a temporary name, flushed to the disk and renamed, so it is whole or
not there. The log is appended to; a checkpoint knows how long the log was, and resuming cuts it there. So a
run killed at any moment goes on from its last checkpoint as if nothing had happened, bit for bit.
"""

import contextlib
import errno
import itertools
import json
import os
import shlex
import time
from pathlib import Path

import torch

from common.errors import UserError
from common.runs import records
from common.runs.flags import AUTO, FLAGS, Options
from common.runs.provenance import changes, foreign_code, is_same_run, own_stair

try:
    import fcntl
except ImportError:  # Windows has no flock; there the folder is not guarded
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of a network's file system


class Folder:
    """The folder of the run with these options: `path`, None until a new run has one, and what is done to its files.

    `config` is the content of config.json, once the folder is open.
    """

    def __init__(self, options: Options, label: str = ""):
        self.options = options
        self.place = options.save / options.script
        self.label = label
        self.resumed = options.resume not in (None, AUTO)  # a run that was started before
        self.path = options.resume if self.resumed else None
        self.config, self.lock, self.is_guarded = None, None, True
        self.log_size, self.columns = 0, None
        self.length = {name: getattr(options, name) for name in options.origin
                       if name in FLAGS and FLAGS[name].when_resumed == "grows"}

    def name_of(self, config: dict) -> str:
        """Cell, stair, what the script adds, a text of one's own, seed and --name.

        Where the script ignores --nvar or --net-type: the name of the class that it builds.
        """
        options = self.options
        cell = options.row if options.origin["net_type"] == "not used" else options.net_type
        stair, text = own_stair(config) or vars(options).get("nvar"), vars(options).get("text")
        return "-".join(filter(None, (cell, stair, self.label, text and Path(text).stem, f"s{options.random_seed}",
                                      options.name)))

    def resume_command(self) -> str:
        return shlex.join(["python", self.options.argv[0], "--resume", str(self.path)])

    def place_for(self, config: dict) -> tuple[Path, bool]:
        """Where a run would be written, and whether it goes on with what is there.

        With `--resume auto` the folder of the run of these very options, if any; else the first free name.
        """
        if self.options.resume == AUTO:
            for path in sorted(self.place.glob("*/config.json")):
                with contextlib.suppress(UserError):  # of a damaged config.json, which is of no run of ours
                    found = records.read_config(path.parent)
                    if is_same_run(found, config) and found["options"].get("name") == config["options"].get("name"):
                        return path.parent, True
        name = self.name_of(config)
        paths = (self.place / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
        return next(path for path in paths if not os.path.lexists(path) or is_left_behind(path)), False

    def open(self, config: dict) -> None:
        """Make the folder of a new run with this `config`, or find that of a run that goes on; and keep other processes
        away from it until `close`.
        """
        try:
            while self.path is None:
                path, self.resumed = self.place_for(config)
                if not self.resumed:
                    path.mkdir(parents=True, exist_ok=True)
                    if not self._take_lock(path) or not is_left_behind(path) or not self._claim(path):
                        self.close()  # another process makes its run in there
                        time.sleep(0.01)
                        continue
                    records.write_json(path / "config.json", config)
                self.path = path
            if self.lock is None and not self._take_lock(self.path):
                raise UserError(f"another process is working on {self.path}; wait for it or stop it first", 1)
        except OSError as error:
            place, way_out = (self.path, "free its permissions") if self.path else \
                (self.place, "choose another place with --save, or a shorter --name")
            raise UserError(f"{place} cannot be written to ({error.strerror}); {way_out}") from None
        self.config = records.read_config(self.path)
        for temporary in self.path.glob(".*.tmp"):  # of a process that was killed
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _take_lock(self, path: Path) -> bool:
        """Whether no other process holds the folder `path`; a file system without locks does not know of one."""
        self.lock = open(path / ".lock", "a")  # noqa: SIM115 (held until `close`)
        self.is_guarded = fcntl is not None
        try:
            if self.is_guarded:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.is_guarded = False
        return True

    def _claim(self, path: Path) -> bool:
        """Whether a new run gets the folder `path`: where there are no locks, one of those that start at once does."""
        with contextlib.suppress(FileExistsError):
            if not self.is_guarded:
                os.close(os.open(path / ".claim", os.O_CREAT | os.O_EXCL))
            return True
        return False

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    @contextlib.contextmanager
    def _open_log(self):
        """The log, to be appended to; a sentence where it cannot be written."""
        log = self.path / "log.csv"
        try:
            with open(log, "ab") as file:
                yield file
        except OSError as error:
            raise UserError(f"{log} could not be written ({error.strerror}); free the disk or its permissions, then go "
                            f"on with {self.resume_command()}", 1) from None

    def append(self, row: dict) -> None:
        """A row of the log; every row has the columns of the first one."""
        lines = [] if self.columns else [list(row)]
        self.columns = self.columns or list(row)
        lines.append([_cell(row.get(column)) for column in self.columns])
        content = "".join(",".join(cells) + "\n" for cells in lines).encode()
        with self._open_log() as file:
            if file.seek(0, os.SEEK_END) != self.log_size:
                raise UserError(f"{self.path / 'log.csv'} was changed by another program while the run went on; stop "
                                f"that one, then go on with {self.resume_command()}", 1)
            file.write(content)
        self.log_size += len(content)

    def _cut_log(self, size: int, columns: list[str] | None) -> None:
        """Go on after the first `size` bytes of the log. It is written anew: a hard link to it, a copy that somebody
        made with `cp -l`, keeps what it says.
        """
        log = self.path / "log.csv"
        if os.path.lexists(log) or size:
            content = log.read_bytes()[:size] if log.exists() else b""
            if len(content) < size:
                raise ValueError("log.csv is shorter than when it was saved")
            if size and list(records.log_rows(self.path, size)[0]) != columns:
                raise ValueError("log.csv has other columns than when it was saved")
            records.write_atomically(log, content)
        self.log_size, self.columns = size, columns

    def save(self, parts: dict, seconds: float) -> None:
        """Save last.pt: the state of every part, the random states, the length of the log."""
        if self.log_size:  # what the checkpoint counts on must be on the disk before it
            with self._open_log() as file:
                os.fsync(file.fileno())
        records.save_tensors(self.path / "last.pt", {
            "run": self.config.get("run"), "parts": {name: part.state_dict() for name, part in parts.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.options.cuda else None,
            "seconds": seconds, "columns": self.columns, "log_size": self.log_size,
            "engine": getattr(parts["model"].network, "engine_that_ran", None)})

    def restore(self, parts: dict, now: dict) -> float | None:
        """Put last.pt into `parts`, and cut the log to where it was. → the seconds of the run, None without last.pt.

        now   config.json as this version would write it: a sentence names what has changed since the run was started
        """
        last = self.path / "last.pt"
        if not os.path.lexists(last):  # killed before the first checkpoint: from the beginning, as the first time
            if records.read_result(self.path) is not None:
                raise UserError(f"{last} is missing, from which a finished run goes on; restore it from a copy or "
                                "start a new run", 1)
            if self.config.get("revision", 1) != self.options.task.REVISION:
                raise UserError(f"{self.path} has no checkpoint, and the same options compute something else since "
                                "it was started (CHANGES.md); start a new run")
            self._cut_log(0, None)
            return None
        changed = changes(self.config, now)
        with records.reading(last, "restore it from a copy or start a new run" if not changed else
                             f"it was written with {', '.join(changed)}: go on with that version or start a new run"):
            state = torch.load(last, map_location="cuda" if self.options.cuda else "cpu", weights_only=True)
            check_run(state.get("run"), self.config)
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            check_finite(parts["model"])
            torch.set_rng_state(state["rng"].cpu())
            if self.options.cuda and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
            parts["model"].network.engine_that_ran = state.get("engine")  # if no update is left to do
            self._cut_log(state["log_size"], state["columns"])
            return float(state["seconds"])

    def save_best(self, model) -> None:
        """The model's weights become best.pt, a plain state dict; torch keeps what is said of one in `_metadata`."""
        weights = model.state_dict()
        weights._metadata["run"] = {"id": self.config.get("run")}
        records.save_tensors(self.path / "best.pt", weights)

    def begin_again(self, now: dict) -> None:
        """Note in config.json a larger number of updates or epochs, and code that is not the project's own, which the
        run goes on with; `now` is config.json of a new run. Delete the old result.
        """
        before = json.dumps(self.config)
        for name, number in self.length.items():
            if self.config["options"][name]["value"] != number:
                self.config["options"][name] = {"value": number, "origin": self.options.origin[name]}
        if foreign := [name for name in foreign_code(now) if name in now["code"]]:
            self.config["code"] = self.config.get("code", {}) | {name: now["code"][name] for name in foreign}
        if json.dumps(self.config) != before:
            records.write_json(self.path / "config.json", self.config)
        for name in ("result.json", "curves.png"):
            (self.path / name).unlink(missing_ok=True)

    def result(self) -> dict | None:
        """result.json, if it has all the updates or epochs that this run is to have."""
        found = records.read_result(self.path)
        is_short = found and any(found.get(name, number) < number for name, number in self.length.items())
        return None if is_short else found

    def finish(self, result: dict, numbers: torch.Tensor | None) -> None:
        """Write the `numbers` of a learned stair, (T,) or (T, H), to stair.csv, then `result` to result.json."""
        if numbers is not None:
            columns = numbers.detach().reshape(len(numbers), -1)                                    # (T, 1 or H)
            names = ["alpha"] if columns.shape[1] == 1 else [f"alpha_{unit}" for unit in range(columns.shape[1])]
            lines = [["t", *names], *([str(t), *map(_cell, row)] for t, row in enumerate(columns.tolist()))]
            records.write_atomically(self.path / "stair.csv", "".join(",".join(line) + "\n" for line in lines).encode())
        records.write_json(self.path / "result.json", result)


def _cell(value) -> str:
    """A number of the log with the digits that a float32 has; an empty cell for None."""
    return "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)


def is_left_behind(path: Path) -> bool:
    """Whether a folder holds nothing: a run was killed before it had a config.json."""
    names = [inside.name for inside in path.iterdir()] if path.is_dir() else ["a file"]
    return all(name.startswith(".") for name in names) and ".claim" not in names


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────


def check_run(found: str | None, config: dict) -> None:
    """Raises ValueError for a file of another run; runs of earlier versions have no number of their own."""
    if found != config.get("run"):
        raise ValueError("it belongs to another run")


def check_finite(model) -> None:
    """Raises ValueError for weights that hold NaN or infinity."""
    if not torch.stack([weight.isfinite().all() for weight in model.state_dict().values()]).all():
        raise ValueError("a weight is not finite")


def check_stair(model, folder: Path, config: dict) -> None:
    """Raises UserError where the model has another stair than the run in `folder`: weights alone do not tell."""
    before, now = config.get("stair"), type(model.network.stair).__name__
    if before not in (None, now):
        raise UserError(f"{folder} is a run with the stair {before}, and the script now builds {now}; restore the line "
                        "that builds the stair, or start a new run")


def load_best(model, folder: Path, config: dict) -> None:
    """Put the weights of the best validation of the run in `folder`, with this `config`, into the model."""
    check_stair(model, folder, config)
    best = Path(folder) / "best.pt"
    with records.reading(best):
        weights = torch.load(best, map_location="cpu", weights_only=True)
        check_run(getattr(weights, "_metadata", {}).get("run", {}).get("id"), config)
        model.load_state_dict(weights)
        check_finite(model)
