"""The files of a run's folder: written whole or not at all, and checked when they are read.

A folder may come from somebody else. So only plain files are opened, never links; each kind of file has one reader,
which checks every type; and no code that a file holds is run.
"""

import contextlib
import csv
import errno
import io
import json
import math
import os
import pickletools
import re
import stat
import warnings
import zipfile
from pathlib import Path

import torch

from common.errors import UserError

# All names in the pickle of a checkpoint of this project.
CHECKPOINT_NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
RECORDS = ("log.csv", "stair.csv", "result.json", "config.json")  # config.json last: a folder without it is not a run
TEXTS = ("row", "device", "engine", "commit")                    # of a result; its other single values are numbers
NESTED = ("versions", "command", "data")


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────


def plain_file(path, flags: int) -> int:
    """An opener for `open` that follows no link and waits for no pipe: a descriptor of a plain file, or an OSError."""
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a link, and only plain files belong to a run"
        raise
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) if stat.S_ISDIR(kind) else \
            OSError(errno.EINVAL, "it is not a plain file", str(path))
    return descriptor


def read_file(path: Path) -> bytes:
    """The bytes of a plain file. Raises OSError."""
    with open(path, "rb", opener=plain_file) as file:
        return file.read()


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────


def write_atomically(path: Path, content: bytes, afterwards: str | None = None) -> None:
    """Write `content` to `path` so that the file is the old one or the new one, whole, at every moment.

    `afterwards` ends the sentence of an error: what to do then. Its default is for the folder of a run.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=plain_file) as file:
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


def write_output(path: Path, content: bytes) -> None:
    """Write what a person asked for with -o; a device, a pipe or a link is written into and never replaced."""
    try:
        path = path.resolve()
        if not path.exists() or path.is_file():
            return write_atomically(path, content, "then ask for it again")
        path.write_bytes(content)
    except (OSError, RuntimeError) as error:  # a folder; links in a circle
        raise UserError(f"{path} cannot be written ({reason_of(error)}); name a file with -o", 1) from None


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def save_tensors(path: Path, content) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────


def load_tensors(path: Path, device="cpu"):
    """torch.load that runs no code from the file. Raises UserError when the file is missing or not whole."""
    if not os.path.lexists(path):
        raise UserError(f"{path} is missing; restore it from a copy or start a new run", 1)
    try:
        raw = read_file(path)
        _check_archive(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which end in the sentence below
            content = torch.load(io.BytesIO(raw), map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:  # torch raises half a dozen types for files that are no checkpoint
        raise UserError(f"{path} is not a checkpoint of this project or is damaged ({reason_of(error)}); "
                        "restore it from a copy or start a new run", 1) from None


def _check_archive(raw: bytes) -> None:
    """Raises ValueError for an archive that would unpack to more than its own size, or that names other code.

    torch.save compresses nothing. torch.load would unpack 12 GB from 50 MB before it finds what is wrong.
    """
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which no checkpoint is")
        if sum(member.file_size for member in members) > len(raw) or len({m.filename for m in members}) < len(members):
            raise ValueError("its parts are larger than the file")
        for member in members:
            if member.filename.endswith(".pkl"):
                for operation, named, _ in pickletools.genops(archive.read(member)):
                    if "GLOBAL" in operation.name and not CHECKPOINT_NAMES.fullmatch(str(named)):
                        raise ValueError(f"it names {named}")


def check_like(own, new, where: str = "") -> None:
    """Raises ValueError unless `new` has the keys, types and shapes of `own`, no NaN and no negative count."""
    shown = f"{where or 'it'} is {str(new)[:40]}"
    if torch.is_tensor(own):
        if not torch.is_tensor(new) or (new.dtype, new.layout) != (own.dtype, own.layout):
            raise ValueError(shown)
        if new.shape != own.shape:
            raise ValueError(f"the size of {where} is {tuple(new.shape)}, not {tuple(own.shape)}")
        if not new.isfinite().all():
            raise ValueError(f"{where} is not finite")
    elif isinstance(own, dict):
        if not isinstance(new, dict):
            raise ValueError(shown)
        if own.keys() != new.keys():
            raise ValueError(f"{sorted(map(str, own.keys() ^ new.keys()))[0][:40]} of {where} is missing or too much")
        for key, value in own.items():
            check_like(value, new[key], f"{where} {key}".strip())
    elif isinstance(own, (list, tuple)):
        if not isinstance(new, (list, tuple)) or len(new) != len(own):
            raise ValueError(shown)
        for value, found in zip(own, new, strict=True):
            check_like(value, found, where)
    elif isinstance(own, float):
        if not isinstance(new, (int, float)) or isinstance(new, bool) or math.isnan(new):
            raise ValueError(shown)
    elif type(own) is not type(new) or (isinstance(own, int) and new < 0) or (isinstance(own, str) and new != own):
        raise ValueError(shown)


def reason_of(error: Exception) -> str:
    """The first words of an error of a library, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it has no {error}"
    first, *more = str(error).splitlines() or [type(error).__name__]
    return (more[0].strip() if more and first.endswith(":") else first)[:80]  # after "Error(s) in loading ...:"


# ── config.json and result.json ──────────────────────────────────────────────────────────────────────────


def is_text(value) -> bool:
    return isinstance(value, str)


def is_number(value) -> bool:
    """Whether a value is a finite number that a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def is_texts(value) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def is_named_texts(value) -> bool:
    return isinstance(value, dict) and all(map(is_text, value.values()))


def is_nothing_or(kind):
    return lambda value: value is None or kind(value)


def is_name(value) -> bool:
    """Whether a value is the stem of a script's file, or the name of a task: no path, nothing that a shell reads."""
    return is_text(value) and re.fullmatch(r"[\w-]+", value, flags=re.ASCII) is not None


def is_option(value) -> bool:
    """Whether a value is what config.json keeps of an option: {"value": ..., "origin": ...}."""
    if not isinstance(value, dict) or not is_text(value.get("origin")) or "value" not in value:
        return False
    values = value["value"] if isinstance(value["value"], list) else [value["value"]]
    return all(v is None or isinstance(v, (bool, str, int, float)) for v in values)


def is_options(value) -> bool:
    return isinstance(value, dict) and all(map(is_option, value.values())) and "net_type" in value \
        and isinstance(value.get("random_seed", {}).get("value"), int)


CONFIG = {"script": is_name, "options": is_options, "row": is_nothing_or(is_text), "argv": is_texts}  # always there
MORE_OF_CONFIG = {"task": is_name, "revision": lambda value: type(value) is int, "stair": is_text,
                  "edited_files": is_texts, "versions": is_nothing_or(is_named_texts),
                  "device": is_nothing_or(is_text), "threads": is_number, "commit": is_nothing_or(is_text),
                  "started": is_text, "data": lambda value: isinstance(value, dict)}


def _parsed(raw: bytes) -> dict:
    """The object that a JSON file holds. Raises ValueError for anything else."""
    try:
        found = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("lists in lists without end") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found


def read_config(folder: Path) -> dict:
    """config.json of a run's folder. Raises UserError when there is none, or where a value is of another type."""
    path = Path(folder) / "config.json"
    try:
        config = _parsed(read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a run's folder: {path} is missing; name another one or start a new run") \
            from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name the folder of a run") from None
    except ValueError:
        raise UserError(f"{path} is damaged; restore it from a copy or start a new run") from None
    for key, fits in {**CONFIG, **MORE_OF_CONFIG}.items():
        if not fits(config[key]) if key in config else key in CONFIG:
            raise UserError(f"{path} is damaged ({key} is {str(config.get(key, 'missing'))[:40]}); restore it from a "
                            "copy or start a new run")
    return config


def read_result(folder: Path) -> dict | None:
    """result.json of a run, None if it is not finished."""
    path = Path(folder) / "result.json"
    try:
        result = _parsed(read_file(path))
        for key, value in result.items():
            fits = is_nothing_or(is_text) if key in TEXTS else is_number
            if key not in NESTED and not fits(value):
                raise ValueError(f"{key} is {str(value)[:40]}")
        return result
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}); restore it from a copy, or delete it and --resume "
                        "the run to write it again", 1) from None


# ── log.csv ──────────────────────────────────────────────────────────────────────────────────────────────


def log_rows(folder: Path, size: int | None = None) -> list[dict]:
    """The rows of log.csv as numbers, None in an empty cell. A run before its first report has none.

    A line that is still being written is left out. `size`: of the first so many bytes only.
    """
    path = Path(folder) / "log.csv"
    try:
        raw = read_file(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name the folder of a run", 1) from None
    try:
        return _rows(raw[:size])
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}); restore it from a copy or leave this run out", 1) \
            from None


def _rows(raw: bytes) -> list[dict]:
    """The rows of a log. Raises ValueError or csv.Error unless it is a table of numbers with a place in each row."""
    lines = list(csv.reader(io.StringIO(raw[:raw.rfind(b"\n") + 1].decode("utf-8"), newline="")))
    if not lines:
        return []
    names, *lines = lines
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise ValueError("its first line does not name the columns")
    places = [name for name in ("update", "epoch", "batch", "seconds") if name in names]
    if places[:1] != ["update"] and places[:2] != ["epoch", "batch"]:
        raise ValueError("it has no column of updates, or of epochs and batches")
    rows = []
    for number, line in enumerate(lines, 2):
        if len(line) != len(names):
            raise ValueError(f"line {number} has {len(line)} cells for {len(names)} columns")
        row = {name: float(cell) if cell else None for name, cell in zip(names, line, strict=True)}
        if not all(row[name] is not None and 0 <= row[name] <= 1e15 for name in places):
            raise ValueError(f"line {number} does not say where it stands")
        rows.append(row)
    return rows


def read_record(folder: Path, name: str) -> str | None:
    """The text of one of `RECORDS`, None where it is not there. Raises UserError where it is not what it should be."""
    path = Path(folder) / name
    if not os.path.lexists(path):
        return None
    {"config.json": read_config, "result.json": read_result, "log.csv": log_rows, "stair.csv": read_stair}[name](folder)
    return read_file(path).decode("utf-8")


def read_stair(folder: Path) -> list[float]:
    """The numbers α_t of stair.csv."""
    path = Path(folder) / "stair.csv"
    try:
        head, *lines = read_file(path).decode("utf-8").splitlines()
        places, numbers = zip(*(line.split(",") for line in lines), strict=True)
        if head != "t,alpha" or list(map(int, places)) != list(range(len(places))):
            raise ValueError("its lines are not t,alpha")
        return list(map(float, numbers))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}); restore it from a copy or leave this run out", 1) \
            from None


def is_not_finite(name: str, value: float | None) -> bool:
    """Whether a cell of the log's column `name` is a loss that is not finite."""
    return "loss" in name and value is not None and not math.isfinite(value)


def is_diverged(folder: Path) -> bool:
    """Whether a run without a result ended in a loss that is not finite. It would end so again, and is not resumed.

    The log does not show weights that are not finite. A run that ended so with finite losses counts as unfinished, and
    stops at the same place when it is resumed.
    """
    return any(is_not_finite(name, value) for row in log_rows(folder)[-1:] for name, value in row.items())


def kind_of(options) -> str:
    """The kind of stair of a script with these options: nvar, alpha or expalpha."""
    return "nvar" if "nvar" in options else "expalpha" if "literal" in options else "alpha"


def own_stair(config: dict) -> str | None:
    """The class of a run's stair where it is not the one that the options name."""
    options, stair = config["options"], config.get("stair")
    usual = {"nvar": "FixedStair", "alpha": "LearnedStair", "expalpha": "ExponentialStair"}[kind_of(options)]
    if options.get("nvar", {}).get("origin") == "not used":
        usual = None
    return None if stair in (None, "NoneType", usual) else stair


def plain(value):
    """An option's value as config.json holds it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
