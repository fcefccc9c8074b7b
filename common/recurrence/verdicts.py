"""Verdicts on the triton engine, each a file in the user's cache folder.

`python -m common.recurrence.verify` writes verdicts, and `auto` on a GPU reads them. A verdict holds for one case
(B, H, rule, nonlinearity, dtype, products) and for the GPU, driver, torch, triton and source that it was found with.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from common.recurrence import triton_engine
from common.recurrence.native_build import user_cache

SOURCES = [Path(__file__).parent / name
           for name in ("triton_engine.py", "triton_kernels.py", "verify.py", "../stair.py")]


@dataclass(frozen=True)
class Case:
    """The case that a verdict is about."""

    batch: int
    hidden: int
    rule: str
    phi: str
    dtype: str          # float32 or float64
    precision: str      # of float32 products: ieee or tf32

    @classmethod
    def of(cls, x: torch.Tensor, rule: str, phi: str) -> "Case":
        """The case of x (T, B, H) as products are formed now."""
        dtype = str(x.dtype).removeprefix("torch.")
        return cls(*x.shape[1:], rule, phi, dtype, triton_engine.precision() if dtype == "float32" else "ieee")

    def flags(self) -> list[str]:
        return ["--batch", str(self.batch), "--hidden", str(self.hidden), "--rule", self.rule, "--nonlin", self.phi,
                *(["--dtype", self.dtype] if self.dtype != "float32" else []),
                *(["--tf32"] if self.precision == "tf32" else [])]

    def __str__(self):
        products = ", tf32" if self.precision == "tf32" else ""
        return f"B {self.batch}, H {self.hidden}, {self.rule}, {self.phi}, {self.dtype}{products}"


@functools.cache
def is_trusted(case: Case, device: torch.device) -> bool:
    """Whether the triton engine has passed this case on this GPU. If not, a line says so, once a process."""
    if (reason := triton_engine.unavailable_reason(device)) is None:
        try:
            verdict = read(case, device)
        except ImportError as error:
            reason = f"triton cannot be imported ({error})"
        else:
            if verdict is None:
                reason = f"the triton engine has not been tested here for {case}; to test it: " \
                         f"python -m common.recurrence.verify {' '.join(case.flags())}"
            elif not verdict["passed"]:
                reason = f"the triton engine has failed its test for {case}: {verdict['reason']}"
    if reason is not None:
        print(f"stair: running the PyTorch engine; {reason}", file=sys.stderr, flush=True)
    return reason is None


def read(case: Case, device: torch.device) -> dict | None:
    """The verdict of this case on this device: `passed`, `reason` and what it holds for; None if there is none."""
    about = _about(case, device)
    try:
        verdict = json.loads(_path(about).read_text(encoding="utf-8"))
        whole = verdict["about"] == about and isinstance(verdict["passed"], bool) and isinstance(verdict["reason"], str)
        return verdict if whole else None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError):     # RuntimeError: there is no home folder
        return None


def write(case: Case, device: torch.device, passed: bool, reason: str) -> Path:
    """Keep a verdict in the place of an older one, whole or not at all. Raises OSError."""
    about = _about(case, device)
    path = _path(about)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump({"passed": passed, "reason": reason, "about": about}, file, indent=2)
    os.replace(file.name, path)
    return path


def _about(case, device) -> dict:
    return {"case": list(astuple(case)), **surroundings(device)}


def _path(about) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache() / f"triton-{digest}.json"


@functools.cache
def surroundings(device: torch.device) -> dict:
    """All that a verdict depends on beside the case."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter on the CPU"
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in SOURCES)).hexdigest()
    return {"device": [name, *triton_engine.capacity(device)], "driver": _driver(), "torch": torch.__version__,
            "triton": triton_engine.version(), "source": digest}


def _driver() -> str:
    """The GPU's driver, as exactly as the system tells."""
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text()
    with contextlib.suppress(OSError, AttributeError):
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return str(version.value)
    return "unknown"
