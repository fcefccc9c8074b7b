"""native.cpp as a library: found, or compiled on first use, and loaded.

The compiler is $CXX, or else c++, g++ or clang++. It makes a plain shared library in a few seconds, which is kept in
$XDG_CACHE_HOME/stair-rnn (~/.cache/stair-rnn). A library's file name holds a digest of what it was made from (source,
compiler, flags, processor) and a digest of its own bytes. A library is loaded only if both fit, and used only after it
has agreed with the PyTorch engine on a small problem.

A library runs with all rights of its user, and a name does not prove where it comes from. So a file is loaded only if
it belongs to this user, nobody else can write to it, and the same holds for its folder. Where there is no such folder,
the library is compiled into a temporary one, for this process alone, and a line says so.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
SCALARS = {torch.float32: "float", torch.float64: "double"}
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-w")
# For some processors GCC splits a lone chain of multiply-adds; a tile of one row then rounds otherwise than a tile of
# six. The parameter forbids that. Clang does not do it and ignores the parameter.
SAME_ROUNDING = "--param=avoid-fma-max-bits=0"
# the first that the compiler accepts
PROCESSOR_FLAGS = (("-march=native", SAME_ROUNDING), ("-march=native",), ("-mcpu=native",), ())
COMPILE_SECONDS = 300
UNMAPPED = 65534  # the owner that a container shows for users that it does not know
PASSES = ("forward", "backward", "states", "kernel_gradient", "square", "exponential", "exponential_backward")


class Unavailable(Exception):
    """Why there is no native engine here, in a sentence."""


class Call(ctypes.Structure):
    """The C++ struct of the same name, field by field."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "steps", "batch", "hidden", "threads", "rule", "phi",
        "kernel_in", "kernel_out", "x_step", "x_row", "h0_row", "grad_step", "grad_row")]
    _fields_ += [(name, ctypes.c_void_p) for name in (
        "openmp_parallel", "kernel", "x", "h0", "numbers", "bias", "kept", "h", "last", "z",
        "grad", "grad_last", "dz", "d_h0", "d_numbers", "d_bias", "d_kernel",
        "logarithm", "grad_rotation", "polynomial", "squares", "kept_products", "rotation", "room", "d_logarithm")]
    _fields_ += [("squarings", ctypes.c_int64)]


class Library:
    """native.cpp, compiled and loaded."""

    def __init__(self, path: Path):
        loaded = ctypes.CDLL(str(path))
        self.entries = {name: getattr(loaded, f"stair_{name}") for name in PASSES}
        for entry in self.entries.values():
            entry.argtypes, entry.restype = [ctypes.POINTER(Call)], ctypes.c_int
        self.smallest, self.multiply_adds = loaded.stair_smallest, loaded.stair_multiply_adds
        self.smallest.argtypes, self.smallest.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_double
        self.multiply_adds.argtypes, self.multiply_adds.restype = [ctypes.c_int64], ctypes.c_double

    def run(self, name, call):
        if self.entries[name](ctypes.byref(call)) != 0:
            raise MemoryError("the native engine ran out of memory")


@functools.cache
def openmp_parallel() -> int | None:
    """The address of the function that starts a parallel region in the OpenMP runtime that torch has loaded, if any."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, TypeError, AttributeError):
        return None


@functools.cache
def say_once(line: str) -> None:
    """Print `line` on the standard error output, the first time that it is said."""
    with contextlib.suppress(OSError, ValueError):  # an output that was closed
        print(line, file=sys.stderr, flush=True)


def load_or_build(dtype, agrees: Callable[[Library], bool]) -> Library:
    """The library for `dtype`, from the cache or compiled now, once `agrees` finds that it computes the right numbers.

    Raises Unavailable, and OSError where for example a disk is full.
    """
    if os.name == "nt":
        raise Unavailable("it is not made for Windows")
    compiler = _compiler()
    name = f"{SCALARS[dtype]}-{_key(compiler, dtype)}"
    try:
        cache = _cache_folder()
    except Unavailable as reason:
        with tempfile.TemporaryDirectory(prefix="stair-rnn-") as private:
            _check_execution(Path(private))
            library = _load(_build(compiler, dtype, Path(private), name), agrees)
        say_once(f"stair: the native engine was compiled for this process alone, because {reason}")
        return library
    for path in sorted(cache.glob(f"{name}-*.so")):
        try:
            return _load(path, agrees)
        except Unavailable:
            with contextlib.suppress(OSError):
                path.unlink()  # it would be found again by every run
    return _load(_build(compiler, dtype, cache, name), agrees)


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


def _key(compiler, dtype) -> str:
    """A digest of all that decides what the library does."""
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"'{shlex.join(compiler)} --version' failed: {error}") from None
    made_from = [SOURCE.read_bytes(), version, _processor().encode(),
                 repr((compiler, shutil.which(compiler[0]), FLAGS, PROCESSOR_FLAGS, SCALARS[dtype])).encode(),
                 repr(Call._fields_).encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in made_from)).hexdigest()[:16]


def _processor() -> str:
    """The processor and its instructions: code compiled for one processor may crash on another."""
    words = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        telling = ("vendor_id", "cpu family", "model", "model name", "flags", "features", "cpu implementer", "cpu part")
        words += [line for line in first if line.split(":")[0].strip().lower() in telling]
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            words.append(subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True,
                                        text=True, timeout=COMPILE_SECONDS).stdout)
    return "\n".join(words)


def user_cache() -> Path:
    """Where this project keeps what it made for this user's machine. Raises RuntimeError without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stair-rnn"


def _cache_folder() -> Path:
    """The user's cache folder for compiled code. Raises Unavailable where none can be used, and says why."""
    try:
        folder = user_cache()
    except RuntimeError:
        raise Unavailable("there is no home folder, and XDG_CACHE_HOME names no other") from None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        status = folder.stat()
        if status.st_uid == os.getuid() and status.st_mode & 0o022:  # our own folder, whose rights were widened
            folder.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
        if (writable := _writable_by_others(folder)) is not None:
            raise Unavailable(f"others can write to {writable}")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written to ({error.strerror})") from None
    _check_execution(folder)
    return folder


def _writable_by_others(folder: Path) -> Path | None:
    """The first of `folder` and the folders above it whose entries another user can replace; None if there is none.

    Root can write everywhere, and does not count; in a container root may show as UNMAPPED. In a folder with the sticky
    bit, such as /tmp, everybody can add entries but nobody can replace them. A group with the user's own number counts
    as the user.
    """
    for place in (folder, *folder.parents):
        status = place.stat()
        others = stat.S_IWOTH if status.st_gid == status.st_uid else stat.S_IWOTH | stat.S_IWGRP
        if place != folder and status.st_mode & stat.S_ISVTX:
            others = 0
        owners = (os.getuid(),) if place == folder else (os.getuid(), 0, UNMAPPED)
        if status.st_uid not in owners or status.st_mode & others:
            return place
    return None


def _check_execution(folder: Path) -> None:
    """Raises Unavailable for a folder on a file system that is mounted noexec."""
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise Unavailable(f"no program may be run from {folder}, which is mounted noexec")


def _build(compiler, dtype, cache, name) -> Path:
    """Compile under a temporary name, then rename, so that another run sees the whole library or none."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
        made = Path(folder) / "native.so"
        for processor_flags in PROCESSOR_FLAGS:
            command = [*compiler, *FLAGS, *processor_flags, f"-DSTAIR_SCALAR={SCALARS[dtype]}", SOURCE, "-o", made]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                      timeout=COMPILE_SECONDS)
            except (OSError, subprocess.SubprocessError) as error:
                raise Unavailable(f"'{shlex.join(compiler)}' failed: {error}") from None
            if done.returncode == 0 and made.exists():
                made.chmod(0o700)
                path = cache / f"{name}-{_digest(made)}.so"
                os.replace(made, path)
                return path
    status = f"exit status {done.returncode}" if done.returncode else "it wrote no library"
    complaint = next((line for line in done.stderr.splitlines() if "error" in line), status)
    raise Unavailable(f"'{shlex.join(compiler)}' could not compile {SOURCE.name}: {complaint.strip()}")


def _digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _load(path, agrees) -> Library:
    """The library at `path`.

    Raises Unavailable unless it is this user's, its bytes fit the digest in its name, it loads, and it computes the
    right numbers.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise Unavailable(f"others can write to {path}")
        if _digest(path) != path.stem.rpartition("-")[2]:
            raise Unavailable(f"{path} is damaged")
        library = Library(path)
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the compiled library does not load: {error}") from None
    if not agrees(library):
        raise Unavailable("the compiled library does not give the numbers of the PyTorch engine")
    return library
