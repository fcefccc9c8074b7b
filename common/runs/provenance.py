"""What a run is a run of: its code by content, the versions, the device, the data; whether two runs compute the same.

config.json names each file that decides a number by its content: the script, and every .py and .cpp file of common/
outside common/runs/. A content has the name that git gives it, sha1("blob SIZE\\0" + bytes), computed without git and
with line ends as \\n. results/published/code.json lists all contents that have been the project's own.
"""

import contextlib
import hashlib
import json
import platform
import time
import uuid
from pathlib import Path

import numpy as np
import torch

from common.runs.flags import Options, kind_of, science
from common.runs.machine import device_name
from common.runs.records import reading, write_json

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED_CODE = ROOT / "results" / "published" / "code.json"
VERSIONS = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def content_name(path: Path) -> str:
    content = path.read_bytes().replace(b"\r\n", b"\n")
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def code_of(script: Path) -> dict[str, str]:
    """{file: content} of a script and of the files of common/ that decide numbers. Files are named from the root."""
    found = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "common").rglob("*"))
             if path.suffix in (".py", ".cpp") and path.parent.name != "runs" and path.is_file()}
    if script.is_file():
        place = script.resolve()
        found = {place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else script.name: place} | found
    return {name: content_name(path) for name, path in found.items()}


def published_code() -> dict[str, list[str]]:
    """{file: all contents that have been the project's own}; empty without the list."""
    if not PUBLISHED_CODE.exists():
        return {}
    with reading(PUBLISHED_CODE, "restore it from a copy"):
        return {**json.loads(PUBLISHED_CODE.read_bytes())}


def foreign_code(config: dict) -> list[str]:
    """The files of a run that are not the project's own: a script of one's own, an edited file; all without the list.

    A record of before the contents were kept names its edited files itself. A file that somebody adds to common/ acts
    only through another one that was edited.
    """
    edited = config.get("edited_files", [])
    if "code" not in config or edited:
        return edited
    code, published = config["code"], published_code()
    missing = [] if any(Path(name).stem == config["script"] for name in code) else [f"{config['script']}.py"]
    return missing + [name for name, content in code.items() if content not in published.get(name, ())
                      and (name in published or not published or not name.startswith("common/"))]


def publish_code() -> list[str]:
    """Add the nine scripts and their code, as they stand here, to the list → the files whose content is new there."""
    published, new = published_code(), []
    for script in ROOT.glob("*_*.py"):
        for name, content in code_of(script).items():
            if content not in published.setdefault(name, []):
                published[name].append(content)
                new.append(name)
    write_json(PUBLISHED_CODE, dict(sorted(published.items())))
    return sorted(new)


def git_commit() -> str | None:
    """12 digits of the commit that .git/HEAD names, or None. The git program would write to .git/index."""
    with contextlib.suppress(OSError):
        head = (ROOT / ".git" / "HEAD").read_text().strip()
        branch = head.removeprefix("ref: ")
        return (head if branch == head else (ROOT / ".git" / branch).read_text())[:12]


def config_of(options: Options, network, device: torch.device, data) -> dict:
    """What config.json says of a run; `data` is the source of what it reads (`common.data`), or None."""
    values = {dest: {"value": as_json(getattr(options, dest)), "origin": source}
              for dest, source in options.origin.items()}
    return {"run": uuid.uuid4().hex, "script": options.script, "task": options.task.NAME,
            "revision": options.task.REVISION, "row": options.row, "argv": options.argv, "options": values,
            "stair": type(network.stair).__name__,
            "code": code_of(options.file), "versions": VERSIONS, "device": device_name(device),
            "threads": torch.get_num_threads(), "commit": git_commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **({} if data is None else {"data": data})}


def as_json(value):
    """An option's value as config.json holds it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def own_stair(config: dict) -> str | None:
    """The class of a run's stair where it is not the one that the options name."""
    options, stair = config["options"], config.get("stair")
    usual = {"nvar": "FixedStair", "alpha": "LearnedStair", "expalpha": "ExponentialStair"}[kind_of(options)]
    if options.get("nvar", {}).get("origin") == "not used":
        usual = None
    return None if stair in (None, "NoneType", usual) else stair


def is_same_run(found: dict, wanted: dict) -> bool:
    """Whether two config.json are of one computation: values, the task's revision, the stair's class, the data, and the
    code that is not the project's own. What an older record does not say counts as the same.
    """
    def key(config):
        digest = (config.get("data") or wanted.get("data") or {}).get("digest")
        return (science(config["options"]), config.get("revision", 1), config.get("stair", wanted.get("stair")), digest,
                [(name, config["code"].get(name)) for name in foreign_code(config) if "code" in config])
    return key(found) == key(wanted)


def changes(config: dict, now: dict) -> list[str]:
    """What is not as it was when the run of `config` was started: versions, device and code, a text each."""
    before = {**(config.get("versions") or {}), "device": config.get("device")}
    after = {**now["versions"], "device": now["device"]}
    if "code" not in config:
        before["commit"], after["commit"] = (config.get("commit") or "").removesuffix("-dirty") or None, now["commit"]
    changed = [f"{name} {before[name]} → {after[name]}" for name in after
               if before.get(name) not in (None, after[name])]
    code = config.get("code", now["code"])
    return changed + sorted(name for name in code | now["code"] if code.get(name) != now["code"].get(name))
