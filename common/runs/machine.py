"""The machine under a run: its device and how it is set up for speed, its name, and whether an update fits into it."""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.runs.flags import Options

try:
    import resource
except ImportError:  # Windows
    resource = None


def prepare_machine(cuda: bool, threads: int | None, tf32: bool = False) -> torch.device:
    """Set up the CPU for speed, the precision of a GPU's float32 products, and → the device.

    Raises UserError if `cuda` is asked for and not there.
    """
    if cuda and not torch.cuda.is_available():
        raise UserError("--cuda was given but torch sees no GPU; leave it out to run on the CPU")
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = min(torch.get_num_threads(), cores_of_quota())
    if threads is not None:
        torch.set_num_threads(threads)
    if cuda:  # before the first call of cuBLAS: with workspaces of one size cuDNN's LSTM gives the same bits every time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # of an LSTM; torch's own default is on
    for number in (np.float32, np.float64):
        np.finfo(number)  # before denormals are zeros: numpy 2.2 warns of it at every later first look
    # Gradients that underflow through hundreds of steps are 10 times slower as denormals than as zeros.
    torch.set_flush_denormal(True)
    return torch.device("cuda" if cuda else "cpu")


def cores_of_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | float:
    """Whole cores that the control groups around this process grant it, at least 1; infinity without a limit."""
    granted = [math.inf]
    with contextlib.suppress(OSError, ValueError):                                       # another system than Linux
        for _, kinds, place in (line.split(":", 2) for line in groups.read_text().splitlines()):
            top = root / "cpu" if "cpu" in kinds.split(",") else root
            for folder in (top / place.strip("/"), *(top / place.strip("/")).parents):
                with contextlib.suppress(OSError, ValueError):                           # no such file, or "max"
                    quota, period = map(int, (folder / "cpu.max").read_text().split())
                    granted.append(max(1, quota // period))
                with contextlib.suppress(OSError, ValueError):
                    quota, period = (int((folder / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
                    granted += [max(1, quota // period)] if quota > 0 else []
    return min(granted)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for the next step, where the C library is glibc.

    Its default hands a large tensor back to the system and faults every page in again at the next
    step: ~90 ms for the 160 MB of a psMNIST sequence. The memory that is kept has holes: up to twice as much is taken.
    Elsewhere this changes nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


@functools.cache
def git_commit() -> str | None:
    """The commit of this checkout, with -dirty where files differ from it; None outside git."""
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], text=True,
                                cwd=Path(__file__).parent, capture_output=True, timeout=10, check=True)
        return result.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def edited_files(script: str) -> list[str]:
    """The script and the files of common/ (but for common/runs/) that differ from the commit; none outside git.

    A digest of the content follows each name, so that two edits of one file are told apart.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        listed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=all", "--no-renames", "--",
                                 f"{script}.py", "common", ":!common/runs"],
                                text=True, cwd=root, capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    files = {line[3:]: root / line[3:] for line in listed.splitlines()}
    return [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:7] if path.is_file() else 'deleted'}"
            for name, path in sorted(files.items())]


@functools.cache
def versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


# ── does it fit ──────────────────────────────────────────────────────────────────────────────────────────

# Arrays of T·B·H numbers that an update takes at its peak, with an output at every step and at the last one only, and
# matrices of H·H numbers; measured, so they hold what an allocator wastes.
ARRAYS = {"native": (4, 2), "torch": (4, 3), "reference": (18, 18), "LSTM": (16, 16)}
SQUARES = {"RNN": 5, "RNN-Orth": 5, "expRNN": 38, "nnRNN": 38, "LSTM": 30}
ANY_UPDATE = 60e6                                                           # bytes, of the smallest one
LARGE = 2e9                                                                 # bytes; above, memory counts more


def memory_needed(options: Options, steps: int, outputs: int, every_step: bool, data: int) -> int:
    """Bytes that an update holds at its peak, about: known before anything is made.

    steps T and `outputs` C of a read-out, at every step or at the last one; `data` bytes that stay in memory.
    """
    kind = "native" if options.engine == "auto" and not options.cuda else options.engine
    kind = "LSTM" if options.net_type == "LSTM" else kind if kind in ARRAYS else "torch"
    places = steps * options.batch                                # T·B
    activations = places * (ARRAYS[kind][not every_step] * options.nhid + 3 * outputs * every_step)
    return int(ANY_UPDATE + 4 * (activations + SQUARES[options.net_type] * options.nhid**2) + 16 * places + data)


def memory_available(device: torch.device) -> int | None:
    """Bytes that this process can still take, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):                                      # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError, AttributeError):                                     # macOS
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder, limit, used, cache in (                                                                # containers
            ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")):
        with contextlib.suppress(OSError, ValueError, KeyError):                        # no such file, or "max"
            read = {name: Path(folder, name).read_text() for name in (limit, used, "memory.stat")}
            freed_when_needed = dict(line.split() for line in read["memory.stat"].splitlines())[cache]
            found.append(int(read[limit]) - int(read[used]) + int(freed_when_needed))
    return min(found, default=None)


def memory_taken(device: torch.device) -> int | None:
    """Bytes that this process has held at most, of the GPU for a GPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_memory(options: Options, device: torch.device, *sizes) -> bool:
    """→ whether an update of these options and `sizes` fits easily, so that freed memory may be kept for the next one.

    Raises UserError where it cannot fit: the system would kill such a run without a message.
    """
    needed, available = memory_needed(options, *sizes), memory_available(device)
    if available is not None and needed > available:
        length = "".join(f"--{flag}, " for flag in ("T", "bptt") if flag in options.origin)
        raise UserError(f"this needs about {needed / 1e9:,.1f} GB of memory and {max(0, available) / 1e9:,.1f} GB are "
                        f"free; lower {length}--batch or --nhid", 1)
    return needed < LARGE and (available is None or needed < available / 4)
