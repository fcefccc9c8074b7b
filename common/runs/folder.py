"""The folder of one run on the disk, while a process works on it.

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
import errno
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from common.errors import UserError
from common.optim import METHODS
from common.runs import records
from common.runs.flags import AUTO, FLAGS, Options, science
from common.runs.machine import device_name, edited_files, git_commit, versions

try:
    import fcntl
except ImportError:  # Windows has no flock; there the folder is not guarded
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of a network's file system
WRONG_CONTENT = (LookupError, TypeError, ValueError, RuntimeError, AttributeError,  # of a checkpoint of something else
                 ArithmeticError)


class Folder:
    """The folder of the run with these options: `path`, None until a new run has one, and what is done to its files."""

    def __init__(self, options: Options, label: str = ""):
        self.options = options
        self.place = Path(options.save) / options.script
        self.label = label
        self.resumed = options.resume not in (None, AUTO)  # a run that was started before
        self.path = options.resume if self.resumed else None
        self.lock = None
        self.log_size, self.columns = 0, None
        self.length = {name: getattr(options, name) for name in options.origin
                       if name in FLAGS and FLAGS[name].when_resumed == "grows"}

    def name_of(self, config: dict) -> str:
        """Cell, stair, what the script adds, seed and --name; a class in the place of an option that is not used."""
        options = self.options
        cell = options.row if options.origin["net_type"] == "not used" else options.net_type
        stair = records.own_stair(config) or vars(options).get("nvar")
        return "-".join(filter(None, (cell, stair, self.label, f"s{options.random_seed}", options.name)))

    def resume_command(self) -> str:
        script = self.options.script
        return f"python {sys.argv[0] if Path(sys.argv[0]).stem == script else f'{script}.py'} --resume {self.path}"

    def find_or_make(self, config: dict) -> None:
        """Make the folder of a new run; with `--resume auto` find that of the run of these very options, if any.

        With `auto` a new one is prepared aside and appears under its name with its config.json in it, so that of two
        processes with the same command one makes it and the other finds it.
        """
        auto, name = self.options.resume == AUTO, self.name_of(config)
        aside = self.place.parent / f".{name}.{os.getpid()}.{time.time_ns()}"
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            if auto:
                aside.mkdir()
                records.write_json(aside / "config.json", config)
            for ending in ("", *(f"-{number}" for number in range(2, 10_000))):
                path = self.place / f"{name}{ending}"
                try:
                    aside.rename(path) if auto else path.mkdir()
                    break
                except OSError as error:  # a rename onto a folder has a number of its own on every system
                    if not (path.is_dir() if auto else isinstance(error, FileExistsError)):
                        raise
                if auto and is_same_run(records.read_config(path), config):
                    self.resumed = True
                    break
            else:
                raise UserError(f"{self.place} already holds 9,999 runs called {name}; choose a --name or another "
                                "--save")
        except OSError as error:
            raise UserError(f"no folder could be made in {self.place} ({error.strerror}); "
                            "choose another place with --save") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self.path = path

    def take(self, config: dict | None) -> list[str]:
        """Take hold of the folder, until `close`; that of a new run gets `config`. → lines for people."""
        notes = []
        if self.path is None:
            self.find_or_make(config)
        try:
            self.lock = open(self.path / ".lock", "a", opener=records.plain_file)  # noqa: SIM115 (held until `close`)
            if fcntl is not None:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working on {self.path}; wait for it or stop it first", 1) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{self.path} cannot be written to ({error.strerror})", 1) from None
            notes.append(f"the file system of {self.path} has no locks ({error.strerror}): see to it that no second "
                         "process works on this run")
        if not self.resumed and self.options.resume != AUTO:  # with `auto` it is there
            records.write_json(self.path / "config.json", config)
        for temporary in self.path.glob(".*.tmp"):  # of a process that was killed
            with contextlib.suppress(OSError):
                temporary.unlink()
        return notes

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    @contextlib.contextmanager
    def _open_log(self, mode: str):
        """The log as a file; a sentence where it cannot be written."""
        log = self.path / "log.csv"
        try:
            with open(log, mode, opener=records.plain_file) as file:
                yield file
        except OSError as error:
            raise UserError(f"{log} could not be written ({error.strerror}); free the disk or its permissions, then go "
                            f"on with {self.resume_command()}", 1) from None

    def append(self, row: dict) -> None:
        """A row of the log; every row has the columns of the first one."""
        lines = [] if self.columns else [list(row)]
        self.columns = self.columns or list(row)
        if missing := set(self.columns) - row.keys():
            raise UserError(f"{self.path / 'log.csv'} has a column {min(missing)}, which this version does not "
                            "write; go on with the version that started this run", 1)
        lines.append([_cell(row[column]) for column in self.columns])
        content = "".join(",".join(cells) + "\n" for cells in lines).encode()
        with self._open_log("ab") as file:
            if file.seek(0, os.SEEK_END) != self.log_size:
                raise UserError(f"{self.path / 'log.csv'} was changed by another program while the run went on; stop "
                                f"that one, then go on with {self.resume_command()}", 1)
            file.write(content)
        self.log_size += len(content)

    def _cut_log(self, size: int, columns: list[str] | None) -> None:
        """Go on after the first `size` bytes of the log, a table of `columns`. Raises ValueError for another table."""
        log = self.path / "log.csv"
        shorter = UserError(f"{log} is shorter than when the checkpoint was saved; restore it from a copy or start a "
                            "new run", 1)
        if os.path.lexists(log):
            with self._open_log("r+b") as file:
                if (found := file.seek(0, os.SEEK_END)) < size:
                    raise shorter
                rows = records.log_rows(self.path, size)
                if columns != (list(rows[0]) if rows else None):
                    raise ValueError(f"its log has the columns {str(columns)[:40]}")
                if found > size:
                    os.truncate(file.fileno(), size)
        elif size:
            raise shorter
        self.log_size, self.columns = size, columns

    def save(self, parts: dict, seconds: float) -> None:
        """Save last.pt: the state of every part, the random states, the length of the log."""
        if self.log_size:  # what the checkpoint counts on must be on the disk before it
            with self._open_log("rb") as file:
                os.fsync(file.fileno())
        records.save_tensors(self.path / "last.pt", {
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.options.cuda else None,
            "seconds": seconds, "columns": self.columns, "log_size": self.log_size,
            "engine": getattr(parts["model"].network, "engine_that_ran", None)})

    def restore(self, parts: dict) -> float | None:
        """Put last.pt into `parts`, and cut the log to where it was. → the seconds of the run, None without last.pt."""
        last = self.path / "last.pt"
        if not os.path.lexists(last):  # killed before the first checkpoint: from the beginning, as the first time
            if records.read_result(self.path) is not None:
                raise UserError(f"{last} is missing, from which a finished run goes on; restore it from a copy or "
                                "start a new run", 1)
            if records.read_config(self.path).get("revision", 1) != self.options.task.REVISION:
                raise UserError(f"{self.path} has no checkpoint, and the same options compute something else since "
                                "it was started (CHANGES.md); start a new run")
            self._cut_log(0, None)
            return None
        state = records.load_tensors(last, "cuda" if self.options.cuda else "cpu")
        with of_this_model(last):
            records.check_like({"seconds": 0.0, "log_size": 0}, {name: state[name] for name in ("seconds", "log_size")})
            for name, part in parts.items():
                if isinstance(part, torch.nn.Module):
                    records.check_like(part.state_dict(), state["parts"][name])
                elif isinstance(part, torch.optim.Optimizer):
                    state["parts"][name] = checked_optimizer(part, state["parts"][name])
                part.load_state_dict(state["parts"][name])
            torch.set_rng_state(state["rng"].cpu())
            if self.options.cuda and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
            if not isinstance(engine := state.get("engine"), str | None):
                raise ValueError(f"its engine is {str(engine)[:40]}")
            parts["model"].network.engine_that_ran = engine  # if no update is left to do
            self._cut_log(state["log_size"], state["columns"])
        return float(state["seconds"])

    def begin_again(self) -> None:
        """Write the number of updates or epochs, where more were typed, to config.json, and delete the old result."""
        config = records.read_config(self.path)
        for name, number in self.length.items():
            if config["options"][name]["value"] != number:
                config["options"][name] = {"value": number, "origin": self.options.origin[name]}
                records.write_json(self.path / "config.json", config)
        for name in ("result.json", "curves.png"):
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()

    def result(self) -> dict | None:
        """result.json, if it has all the updates or epochs that this run is to have."""
        found = records.read_result(self.path)
        is_short = found and any(found.get(name, number) < number for name, number in self.length.items())
        return None if is_short else found

    def changes(self, device: torch.device) -> list[str]:
        """Lines for people: where the machine is not the one that the run was started on, where the code was edited."""
        config, lines = records.read_config(self.path), []
        before = {**(config.get("versions") or {}), "device": config.get("device"), "commit": config.get("commit")}
        now = {**versions(), "device": device_name(device), "commit": git_commit()}
        changed = [f"{name} {before[name]} → {now[name]}" for name in now if before.get(name) not in (None, now[name])]
        if changed:
            lines.append(f"not as it was started: {', '.join(changed)}; the last digits may differ")
        then, now = config.get("edited_files", []), edited_files(config["script"])
        if then != now:
            lines.append(f"edited files when it was started: {', '.join(then) or 'none'}; "
                         f"now: {', '.join(now) or 'none'}; the numbers may be others")
        return lines

    def finish(self, result: dict, stair) -> None:
        """Write t and α_t of a learned stair with one number a step to stair.csv, then `result` to result.json."""
        numbers = getattr(stair, "numbers", None)
        if isinstance(numbers, torch.nn.Parameter) and numbers.ndim == 1:
            lines = ["t,alpha", *(f"{t},{value:.7g}" for t, value in enumerate(numbers.flatten().tolist()))]
            records.write_atomically(self.path / "stair.csv", ("\n".join(lines) + "\n").encode())
        records.write_json(self.path / "result.json", result)


def config_of(options: Options, network, device: torch.device, data) -> dict:
    """What config.json says of a run; `data` is the `common.data.Source` of what it reads, or None."""
    values = {dest: {"value": records.plain(getattr(options, dest)), "origin": source}
              for dest, source in options.origin.items()}
    return {"script": options.script, "task": options.task.NAME, "revision": options.task.REVISION, "row": options.row,
            "argv": sys.argv, "options": values, "stair": type(network.stair).__name__,
            "edited_files": edited_files(options.script), "versions": versions(), "device": device_name(device),
            "threads": torch.get_num_threads(), "commit": git_commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **({} if data is None else {"data": data.record()})}


def is_same_run(found: dict, wanted: dict) -> bool:
    """Whether two config.json are of the same computation: values, the task's revision and the stair's class."""
    def key(config):
        return science(config["options"]), config.get("revision", 1), config.get("stair", wanted.get("stair"))
    return key(found) == key(wanted)


def _cell(value) -> str:
    """A number of the log with the digits that a float32 has; an empty cell for None."""
    return "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)


def checked_optimizer(optimizer, state: dict) -> dict:
    """The `state` of a checkpoint as `optimizer` loads it: its own settings, with the rates and averages of `state`.

    Raises ValueError or LookupError where it is not the state of such an optimizer.
    """
    groups, kept = [], set()
    for mine, theirs in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
        records.check_like(mine, theirs, "its optimizer")
        if not 0 <= theirs["lr"] <= mine["lr"] or theirs["params"] != mine["params"]:
            raise ValueError(f"its lr is {theirs['lr']}")
        groups.append({**mine, "lr": float(theirs["lr"])})
    parameters = [(p, group["method"]) for group in optimizer.param_groups for p in group["params"]]
    for index, gathered in state["state"].items():
        parameter, method = parameters[index]
        own = {name: 0 if name == "step" else parameter.detach() for name in METHODS[method]}
        records.check_like(own, gathered, "its optimizer")
        kept.add(index)
    if kept and len(kept) < len(parameters):
        raise ValueError("its optimizer leaves a parameter out")
    return {"state": state["state"], "param_groups": groups}


@contextlib.contextmanager
def of_this_model(path: Path):
    """Where what `path` holds turns out within this context to be of another model, that is a sentence."""
    try:
        yield
    except WRONG_CONTENT as error:
        raise UserError(f"{path} is not a checkpoint of the model that {path.parent / 'config.json'} describes ("
                        f"{records.reason_of(error)}); restore the one that belongs there or start a new run", 1) \
            from None


def put_best(model, folder: Path) -> None:
    """Put the weights of the best validation of the run in `folder` into the model."""
    best = Path(folder) / "best.pt"
    with of_this_model(best):
        model.load_state_dict(records.load_tensors(best))


def check_stair(model, folder: Path) -> None:
    """Raises UserError where the model has another stair than the run in `folder`: weights alone do not tell."""
    before, now = records.read_config(folder).get("stair"), type(model.network.stair).__name__
    if before not in (None, now):
        raise UserError(f"{folder} is a run with the stair {before}, and the script now builds {now}; restore the line "
                        "that builds the stair, or start a new run")
