"""Moments: the places between which a run can be stopped while it writes.

`watch` counts them in a forked session and acts at one of them. A file is opened, half written, written, flushed
to the disk, renamed, cut; a folder is made; a picture is drawn: before and after each of these is a moment.
"""

import ctypes
import errno
import json
import os
import signal
import time
from pathlib import Path

import matplotlib.figure

from common.runs import run
from tests.robustness.sessions import name_of, run_folder


class Moments:
    """Counts the moments of a session. At moment `at` (from 1) `act` is called with its name."""

    def __init__(self, at: int | None = None, act=None):
        self.at, self.act, self.names, self.files = at, act, [], {}

    def reach(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.at:
            self.act(name)

    def install(self) -> None:
        """Put the moments into this process: common/runs/run.py's `open`, what it uses of `os`, and savefig."""
        run.open = self.open
        os.fsync = self.between(os.fsync, "flush to the disk", lambda descriptor: self.files.get(descriptor, "?"))
        os.replace = self.between(os.replace, "rename", lambda source, target: name_of(target))
        os.truncate = self.between(os.truncate, "cut", lambda path, size: name_of(path))
        os.mkdir = self.between(os.mkdir, "make", lambda path, *mode: "folder")
        matplotlib.figure.Figure.savefig = self.savefig(matplotlib.figure.Figure.savefig)

    def between(self, function, verb, label):
        def called(*given, **named):
            what = f"{label(*given)}: {verb}"
            self.reach(f"{what}, before")
            result = function(*given, **named)
            self.reach(f"{what}, after")
            return result
        return called

    def open(self, path, mode="r", **named):
        name = name_of(path)
        if "r" not in mode:
            self.reach(f"{name}: open, before")
        file = open(path, mode, **named)  # noqa: SIM115 (the caller closes it)
        self.files[file.fileno()] = name
        if "r" not in mode:
            self.reach(f"{name}: open, after")
        return _File(file, self, name)

    def savefig(self, draw):
        def drawn(figure, buffer, **named):
            self.reach("curves.png: draw, before")
            draw(figure, buffer, **named)
            self.reach("curves.png: draw, after")
        return drawn


class _File:
    """An open file whose content is written in two halves."""

    def __init__(self, file, moments: Moments, name: str):
        self._file, self._moments, self._name = file, moments, name

    def __getattr__(self, attribute):
        return getattr(self._file, attribute)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def write(self, content):
        half = len(content) // 2
        for part, moment in ((content[:half], "half written"), (content[half:], "written")):
            self._file.write(part)
            self._file.flush()
            self._moments.reach(f"{self._name}: {moment}")
        return len(content)


# ── what can happen at a moment ──────────────────────────────────────────────────────────────────────────


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def vanish(name: str) -> None:
    """The folder of runs is moved away, as if its disk were pulled out."""
    os.rename("saves", "moved")


def lock_up(name: str) -> None:
    """The folder of the run becomes read-only."""
    no_privileges()
    os.chmod(run_folder(Path()), 0o555)


def no_privileges() -> None:
    """Permissions hold for root too, from here on in this process (capset(2) without the CAP_DAC ones)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets) == 0:
        for word in range(3):
            sets[word] &= ~0b110  # effective, permitted, inheritable
        libc.capset(header, sets)


def hold(name: str) -> None:
    """Wait here until the file `release` is there, and say so with the file `held`."""
    Path("held").touch()
    while not Path("release").exists():
        time.sleep(0.005)


def at(moment: int, act):
    """For `Session(prepare=...)`: act at a moment."""
    return lambda: Moments(moment, act).install()


def write_names(path: Path):
    """For `Session(prepare=...)`: only count, and write the moments' names to a file at each of them."""
    def prepare():
        moments = Moments()
        reach = moments.reach

        def reach_and_write(name):
            reach(name)
            path.write_text(json.dumps(moments.names))

        moments.reach = reach_and_write
        moments.install()
    return prepare
