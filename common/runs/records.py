"""The files of a run's folder: written whole or not at all, and read by one function a file.

Whatever is wrong with a file, json, csv, torch or a model notices it; `reading` makes one sentence of that.
"""

import contextlib
import csv
import io
import json
import math
import os
from pathlib import Path

import torch

from common.errors import UserError


@contextlib.contextmanager
def reading(path: Path, advice: str = "restore it from a copy or start a new run"):
    """What goes wrong within this context, where the file `path` is read and used, becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch alone raises half a dozen types for a file that is no checkpoint
        raise UserError(f"{path} cannot be used ({reason_of(error)}); {advice}", 1) from None


def reason_of(error: Exception) -> str:
    """The first words of an error of a library, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it has no {error}"
    first, *more = str(error).splitlines() or [type(error).__name__]
    return (more[0].strip() if more and first.endswith(":") else first)[:80]  # after "Error(s) in loading ...:"


@contextlib.contextmanager
def writing(path: Path, advice: str = ""):
    """An error of the disk within this context, where `path` is written, becomes one sentence; it ends in `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); what was saved before is untouched. Free the "
                        f"disk or its permissions, {advice or f'then go on with --resume {path.parent}'}", 1) from None


def write_atomically(path: Path, content: bytes, advice: str = "") -> None:
    """Write `content` to `path` so that the file is the old one or the new one, whole, at every moment.

    A link stays one: the file that it names is written. What is no file, a device or a pipe, is written into.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with writing(path, advice):
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """A half of a surrogate pair, as a path that is not UTF-8 holds, is written as JSON's own escape."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def save_tensors(path: Path, content) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def read_config(folder: Path) -> dict:
    """config.json of a run's folder. Raises UserError when there is none, or where it is no record of a run."""
    path = Path(folder) / "config.json"
    if not os.path.exists(path):
        raise UserError(f"{folder} is not a run's folder: {path} is missing; name another one or start a new run")
    with reading(path):
        config = json.loads(path.read_bytes())
        for key in ("script", "row", "argv"):   # what is missing is found here and not where it is used
            config[key]
        for option in config["options"].values():
            option["value"], option["origin"]
        config["options"]["net_type"], config["options"]["random_seed"]
    return config


def read_result(folder: Path) -> dict | None:
    """result.json of a run, None if it is not finished."""
    path = Path(folder) / "result.json"
    if not os.path.lexists(path):
        return None
    with reading(path, "restore it from a copy, or delete it and --resume the run to write it again"):
        return {**json.loads(path.read_bytes())}


def log_rows(folder: Path, size: int | None = None, name: str = "log.csv") -> list[dict]:
    """The rows of log.csv as numbers, None in an empty cell. A run before its first report has none.

    A line that is still being written is left out. `size`: of the first so many bytes only.
    """
    path = Path(folder) / name
    if not os.path.lexists(path):
        return []
    with reading(path, "restore it from a copy or leave this run out"):
        raw = path.read_bytes()[:size]
        lines = csv.reader(io.StringIO(raw[:raw.rfind(b"\n") + 1].decode(), newline=""))
        names = next(lines, [])
        return [{name: float(cell) if cell else None for name, cell in zip(names, line, strict=True)} for line in lines]


def read_stair(folder: Path) -> list[list[float]]:
    """stair.csv: for every step t the learned numbers, one, or one for every unit."""
    return [list(row.values())[1:] for row in log_rows(folder, name="stair.csv")]


RECORDS = {"log.csv": log_rows, "stair.csv": read_stair, "result.json": read_result,
           "config.json": read_config}  # the last: a folder without it is not a run


def read_record(folder: Path, name: str) -> str | None:
    """The text of one of `RECORDS`, None where it is not there. Raises UserError where it is not what it should be."""
    path = Path(folder) / name
    if not os.path.lexists(path):
        return None
    RECORDS[name](folder)
    return path.read_text(encoding="utf-8")


def is_not_finite(name: str, value: float | None) -> bool:
    """Whether a cell of the log's column `name` is a loss that is not finite."""
    return "loss" in name and value is not None and not math.isfinite(value)


def is_diverged(folder: Path) -> bool:
    """Whether the last row of the log has a loss that is not finite: the run would end so again when it is resumed."""
    return any(is_not_finite(name, value) for row in log_rows(folder)[-1:] for name, value in row.items())
