"""The folder of one run on the disk, while a process works on it.

    saves/copytask_nvar/expRNN-expn-s400/
      config.json   every resolved value and its origin, argv, code by content, versions, device
      log.csv       a row per report
      last.pt       everything that `--resume` needs;  best.pt  the weights of the best validation
      curves.png    drawn from log.csv
      stair.csv     the numbers of a learned stair, of the weights that the result is about
      result.json   written last: its presence means finished

Every file but the log is written under a temporary name, flushed to the disk and renamed, so it is whole or not there.
A checkpoint knows how long the log was, and resuming cuts it there. So a run killed at any moment goes on from its last
checkpoint as if nothing had happened, bit for bit.
"""

import contextlib
import itertools
import os
import shlex
from pathlib import Path

import torch

from common.errors import UserError
from common.runs import records
from common.runs.flags import AUTO, FLAGS, LENGTH, Options
from common.runs.provenance import foreign_code, is_same_run, own_stair

try:
    import fcntl
except ImportError:  # Windows has no flock; there the folder is not guarded
    fcntl = None


def lock(path: Path, wait: bool = False):
    """Open `path` and lock it for as long as it is open. Raises BlockingIOError where another process has locked it.

    Windows and the disks of some networks lock nothing; there it is not guarded.
    """
    file = open(path, "a")  # noqa: SIM115 (the caller closes it)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass
    return file


class Folder:
    """The folder of the run with these options: `path`, None until a new run has one, and what is done to its files.

    `config` is the content of config.json, once the folder is open.
    """

    def __init__(self, options: Options, label: str = ""):
        self.options, self.label = options, label
        self.place = options.save / options.script
        self.resumed = options.resume not in (None, AUTO)  # a run that was started before
        self.path = options.resume if self.resumed else None
        self.config = self.lock = self.columns = None
        self.log_size = 0
        self.length = {name: getattr(options, name) for name in options.origin
                       if name in FLAGS and FLAGS[name].group is LENGTH}

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
        return next(path for path in paths if not os.path.lexists(path)), False

    def open(self, config: dict) -> None:
        """Make the folder of a new run with this `config`, or find that of a run that goes on; and keep other processes
        away from it until `close`.
        """
        path = self.path or self.place
        try:
            with contextlib.ExitStack() as choosing:
                if self.path is None:
                    path.mkdir(parents=True, exist_ok=True)
                    choosing.enter_context(lock(self.options.save / ".lock", wait=True))  # one start after the other
                    path, self.resumed = self.place_for(config)
                    path.mkdir(exist_ok=self.resumed)
                self.lock = lock(path / ".lock")
                if not self.resumed:
                    records.write_json(path / "config.json", config)
        except BlockingIOError:
            raise UserError(f"another process is working on {path}; wait for it or stop it first", 1) from None
        except OSError as error:
            raise UserError(f"{path} cannot be written to ({error.strerror}); free its permissions, or choose another "
                            "place with --save or a shorter --name") from None
        self.path, self.config = path, records.read_config(path)
        for temporary in path.glob(".*.tmp"):  # of a process that was killed
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def append(self, row: dict) -> None:
        """A row of the log, on the disk when this returns. Every row has the columns of the first one."""
        lines = [] if self.columns else [list(row)]
        self.columns = self.columns or list(row)
        lines.append([_cell(row.get(column)) for column in self.columns])
        content = "".join(",".join(cells) + "\n" for cells in lines).encode()
        log = self.path / "log.csv"
        with records.writing(log), open(log, "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.log_size += len(content)

    def _cut_log(self, size: int) -> None:
        """Go on after the first `size` bytes of the log. It is written anew: a hard link to it, a copy that somebody
        made with `cp -l`, keeps what it says.
        """
        log = self.path / "log.csv"
        content = log.read_bytes() if os.path.lexists(log) else b""
        if len(content) < size:
            raise ValueError("log.csv is shorter than when it was saved")
        rows = records.log_rows(self.path, size)
        if content:
            records.write_atomically(log, content[:size])
        self.log_size, self.columns = size, list(rows[0]) if rows else None

    def save(self, parts: dict, seconds: float) -> None:
        """Save last.pt: the state of every part, the random states, the length of the log."""
        records.save_tensors(self.path / "last.pt", {
            "run": self.config.get("run"), "parts": {name: part.state_dict() for name, part in parts.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.options.cuda else None,
            "seconds": seconds, "log_size": self.log_size,
            "engine": getattr(parts["model"].network, "engine_that_ran", None)})

    def restore(self, parts: dict) -> float | None:
        """Put last.pt into `parts`, and cut the log to where it was. → the seconds of the run, None without last.pt."""
        last = self.path / "last.pt"
        if not os.path.lexists(last):  # killed before the first checkpoint: from the beginning, as the first time
            if records.read_result(self.path) is not None:
                raise UserError(f"{last} is missing, from which a finished run goes on; restore it from a copy or "
                                "start a new run", 1)
            if self.config.get("revision", 1) != self.options.task.REVISION:
                raise UserError(f"{self.path} has no checkpoint, and the same options compute something else since "
                                "it was started (CHANGES.md); start a new run")
            self._cut_log(0)
            return None
        with records.reading(last, "restore it from a copy, go on with the version that it was started with, or start "
                                   "a new run"):
            state = torch.load(last, map_location="cuda" if self.options.cuda else "cpu", weights_only=True)
            if state.get("run") != self.config.get("run"):  # None in runs of earlier versions
                raise ValueError("it belongs to another run")
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            if not is_finite(parts["model"]):
                raise ValueError("a weight is not finite")
            torch.set_rng_state(state["rng"].cpu())
            if self.options.cuda and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
            parts["model"].network.engine_that_ran = state.get("engine")  # if no update is left to do
            self._cut_log(state["log_size"])
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
        for name, number in self.length.items():
            self.config["options"][name] = {"value": number, "origin": self.options.origin[name]}
        if foreign := [name for name in foreign_code(now) if name in now["code"]]:
            self.config["code"] = self.config.get("code", {}) | {name: now["code"][name] for name in foreign}
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


def is_finite(model) -> bool:
    """Whether no weight is NaN or infinite."""
    return bool(torch.stack([weight.isfinite().all() for weight in model.state_dict().values()]).all())


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
        if getattr(weights, "_metadata", {}).get("run", {}).get("id") != config.get("run"):
            raise ValueError("it belongs to another run")
        model.load_state_dict(weights)
        if not is_finite(model):
            raise ValueError("a weight is not finite")
