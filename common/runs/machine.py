"""The machine under a run: its device and how it is set up for speed, its name, and the memory that was taken."""

import contextlib
import ctypes
import math
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None


def prepare_machine(cuda: bool, threads: int | None, tf32: bool = False) -> torch.device:
    """Set up the CPU for speed, a GPU's precision of float32 products; → the device. Raises UserError without a GPU."""
    if cuda and not torch.cuda.is_available():
        raise UserError("--cuda was given but torch sees no GPU; leave it out to run on the CPU")
    if tf32 and not cuda:
        raise UserError("--tf32 has no meaning on the CPU, whose products are exact; add --cuda or leave it out")
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
            group = (root / "cpu" if "cpu" in kinds.split(",") else root) / place.strip("/")
            for folder in (group, *group.parents):                                       # version 2, else version 1
                files = (folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
                quota, *period = " ".join(file.read_text() for file in files if file.is_file()).split() or ["max"]
                if quota not in ("max", "-1"):
                    granted.append(max(1, int(quota) // int(*period)))
    return min(granted)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for the next step, where the C library is glibc.

    Its default hands a large tensor back to the system and faults every page in again at the next step: ~90 ms for the
    160 MB of a psMNIST sequence. The memory that is kept has holes: up to twice as much is taken.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def memory_taken(device: torch.device) -> int | None:
    """Bytes that this process has held at most, of the GPU for a GPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
