"""A C++ source as a library: found in the user's cache, or compiled on first use.

The compiler is $CXX, or else c++, g++ or clang++. It makes a plain shared library in some seconds, which is kept in
$XDG_CACHE_HOME/stair-rnn (~/.cache/stair-rnn). A library's file name holds a digest of what it was made from (source,
compiler, flags, processor) and a digest of its own bytes. It gets this name only after it has passed its trial, and it
is loaded only if both digests fit.

A library runs with all rights of its user. So the folder is this user's own and open to nobody else, and so is the
file. Where there is no such folder, the library is compiled into a temporary one, for this process alone, and a line
says so. Nothing is kept of a compiler that fails: the next run tries again.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-w")
# For some processors GCC splits a lone chain of multiply-adds; a tile of one row then rounds otherwise than a tile of
# six. The parameter forbids that. Clang does not do it and ignores the parameter.
SAME_ROUNDING = "--param=avoid-fma-max-bits=0"
# the first that the compiler does not refuse
PROCESSOR_FLAGS = (("-march=native", SAME_ROUNDING), ("-march=native",), ("-mcpu=native",), ())
REFUSAL = re.compile("^(?=.*(-march|-mcpu|avoid-fma)).*(error|unrecogni|unknown|support|invalid)", re.MULTILINE | re.I)
COMPILE_SECONDS = 300


class Unavailable(Exception):
    """Why there is no native engine here, in a sentence."""


@functools.cache
def say_once(line: str) -> None:
    """Print `line` on the standard error output, the first time that it is said."""
    with contextlib.suppress(OSError, ValueError):  # an output that was closed
        print(line, file=sys.stderr, flush=True)


def load_or_build(source: Path, defines: Sequence[str], trial: Callable[[Path], str | None]) -> ctypes.CDLL:
    """The library of `source` with these preprocessor `defines`, from the cache or compiled now.

    trial   → what is wrong with the new library at a path, in words, or None. Not asked again for a kept one.

    Raises Unavailable, and OSError where for example a disk is full.
    """
    if fcntl is None:
        raise Unavailable("it is not made for Windows")
    compiler = _compiler()
    name = f"{source.stem}-{_key(compiler, source, defines)}"
    with contextlib.ExitStack() as at_end:
        try:
            cache = cache_folder()
            if (library := _kept(cache, name)) is not None:
                return library
            lock = at_end.enter_context(open(cache / "lock", "w"))
        except (Unavailable, OSError) as reason:
            with tempfile.TemporaryDirectory(prefix="stair-rnn-") as private:
                library = _load(_build(compiler, source, defines, trial, Path(private), name))
            say_once(f"stair: the native engine was compiled for this process alone, because {reason}")
            return library
        with contextlib.suppress(OSError):  # a file system without locks: two runs that start together both compile
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (library := _kept(cache, name)) is not None:
                return library
            for folder in cache.glob("build-*"):  # of a build that was killed
                shutil.rmtree(folder, ignore_errors=True)
        return _load(_build(compiler, source, defines, trial, cache, name))


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(wanted)] if wanted else [[name] for name in COMPILERS]
    except ValueError as error:  # a quotation mark without its partner
        raise Unavailable(f"CXX is '{wanted}', which is not a command: {str(error).lower()}") from None
    for command in commands:
        if shutil.which(command[0]):
            return command
    raise Unavailable(f"CXX is '{wanted}', which is not a program" if wanted
                      else f"no C++ compiler found ({', '.join(COMPILERS)}; CXX can name another)")


def _key(compiler, source, defines) -> str:
    """A digest of all that decides what the library does."""
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"'{shlex.join(compiler)} --version' failed: {error}") from None
    made_from = [source.read_bytes(), version, _processor().encode(),
                 repr((compiler, shutil.which(compiler[0]), FLAGS, PROCESSOR_FLAGS, tuple(defines))).encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in made_from)).hexdigest()[:16]


def _processor() -> str:
    """The processor and its instructions: code compiled for one processor may crash on another."""
    words = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        telling = ("vendor_id", "cpu family", "model", "model name", "flags", "features", "cpu implementer", "cpu part")
        words += [line for line in first if line.split(":")[0].strip().lower() in telling]
    return "\n".join(words)


def cache_folder() -> Path:
    """Where this project keeps what it made for this user's machine: a folder of the user's own, of mode 700.

    Raises Unavailable where there is no such folder and none can be made, and says why.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stair-rnn"
    except RuntimeError:
        raise Unavailable("there is no home folder, and XDG_CACHE_HOME names no other") from None
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        link = next((place for place in missing if place.is_symlink()), None)
        if link is not None:
            raise Unavailable(f"{link} is a link to nowhere")
        if missing:  # a shared place, such as /tmp, has the sticky bit or is root's; else it is somebody's home
            above = missing[-1].parent
            if above.stat().st_uid not in (os.getuid(), 0) and not above.stat().st_mode & stat.S_ISVTX:
                raise Unavailable(f"{above} belongs to another user")
        for place in reversed(missing):
            place.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise Unavailable(f"{folder} belongs to another user")
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
        if folder.stat().st_mode & 0o022:  # a file system without modes
            raise Unavailable(f"others can write to {folder}")
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written to ({error.strerror})") from None
    return folder


def _build(compiler, source, defines, trial, cache, name) -> Path:
    """Compile and try under a temporary name, then rename: another run sees a whole library that is right, or none."""
    say_once("stair: compiling the native engine, once on this machine: ten seconds, or thirty where it is busy")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
        made = Path(folder) / f"{name}.so"
        _compile(compiler, source, defines, made)
        made.chmod(0o700)
        path = cache / f"{name}-{_digest(made)}.so"
        if (wrong := trial(made)) is not None:
            raise Unavailable(f"the compiled library is not right: {wrong}")
        os.replace(made, path)
    say_once(f"stair: compiled and tested in {time.monotonic() - began:.0f} s")
    return path


def _compile(compiler, source, defines, made: Path) -> None:
    """Weaker flags are tried only where the compiler refuses a flag: a slow library would be kept for good."""
    for flags in PROCESSOR_FLAGS:
        command = [*compiler, *FLAGS, *flags, *(f"-D{define}" for define in defines), source, "-o", made]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS,
                                  env={**os.environ, "LC_ALL": "C"})
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"'{shlex.join(compiler)}' failed: {error}") from None
        if done.returncode == 0 and made.exists():
            return
        if done.returncode <= 0 or not REFUSAL.search(done.stderr):
            break
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    complaint = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    how = f"signal {-done.returncode}" if done.returncode < 0 else \
        f"exit status {done.returncode}" if done.returncode else "it wrote no library"
    raise Unavailable(f"'{shlex.join(compiler)}' could not compile {source.name}: {complaint or how}")


def _digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _kept(cache, name) -> ctypes.CDLL | None:
    """The library of this name in the cache, if there is one that can be loaded; the others go."""
    for path in sorted(cache.glob(f"{name}-*.so")):
        try:
            return _load(path)
        except Unavailable:
            with contextlib.suppress(OSError):
                path.unlink()
    return None


def _load(path) -> ctypes.CDLL:
    """The library at `path`. Raises Unavailable unless it is this user's, its bytes fit its name, and it loads."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise Unavailable(f"others can write to {path}")
        if _digest(path) != path.stem.rpartition("-")[2]:
            raise Unavailable(f"{path} is damaged")
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled library does not load: {error}") from None
