"""The files of a run's folder: written whole or not at all, read back as numbers or with a sentence."""

import contextlib
import csv
import io
import json
import math
import os
import warnings
from pathlib import Path

import torch

from common.errors import UserError


def write_atomically(path: Path, content: bytes, afterwards: str | None = None) -> None:
    """Write `content` to `path` so that the file is the old one or the new one, whole, at every moment.

    `afterwards` ends the sentence for a disk that is full; of a run, how to go on.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder may be gone, or closed to us
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error.strerror}); what was saved before is untouched. "
                        f"Free the disk or its permissions, {afterwards or f'then go on with --resume {path.parent}'}",
                        1) from None


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def save_tensors(path: Path, content) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_tensors(path: Path, device="cpu"):
    """torch.load that runs no code from the file. Raises UserError when the file is missing or not whole."""
    if not path.exists():
        raise UserError(f"{path} is missing; restore it from a copy or start a new run", 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which end in the sentence below
            content = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:  # torch raises half a dozen types for files that are no checkpoint
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a checkpoint of this project or is damaged ({first_line[:80]}); "
                        "restore it from a copy or start a new run", 1) from None


def read_config(folder: Path) -> dict:
    """config.json of a run's folder. Raises UserError when there is none."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        whole = all(key in config for key in ("script", "options", "row", "argv")) and "net_type" in config["options"] \
            and all({"value", "origin"} <= entry.keys() for entry in config["options"].values())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a run's folder: {path} is missing; name another one or start a new run") \
            from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name the folder of a run") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged; restore it from a copy or start a new run")
    return config


def read_result(folder: Path) -> dict | None:
    """result.json of a run, None if it is not finished."""
    path = Path(folder) / "result.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged; restore it from a copy, or delete it and --resume the run to "
                            "write it again", 1) from None


def log_rows(folder: Path) -> list[dict]:
    """The rows of log.csv as numbers, None in an empty cell. A run before its first report has none."""
    try:
        with open(Path(folder) / "log.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}/log.csv cannot be read ({error.strerror}); name the folder of a run") from None
    try:
        return [{name: float(cell) if cell else None for name, cell in row.items()} for row in rows]
    except (TypeError, ValueError):
        raise UserError(f"{folder}/log.csv is damaged; restore it from a copy or leave this run out", 1) from None


def is_not_finite(name: str, value: float | None) -> bool:
    """Whether a cell of the log's column `name` is a loss that is not finite."""
    return "loss" in name and value is not None and not math.isfinite(value)


def is_diverged(folder: Path) -> bool:
    """Whether a run without a result ended in a loss that is not finite: it would again, so it is not gone on with.

    Where the losses were finite to the last and the weights no more, the log does not show it: such a run counts as
    unfinished, and stops at the same place when it is resumed.
    """
    return any(is_not_finite(name, value) for row in log_rows(folder)[-1:] for name, value in row.items())


def plain(value):
    """An option's value as config.json holds it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
