"""The native CPU engine: the whole sequence, forward or backward, in one call of compiled code (native.cpp).

    forward     z_t = x_t + h_{t-1} W,  h_t = g_t(z_t) φ(z_t)                         all t in one call
    backward    δh_t = ∂L/∂h_t + δz_{t+1} Wᵀ,  δz_t = δh_t · ∂h_t/∂z_t                 all t in one call
    gradients   dW = Σ_t h_{t-1}ᵀ δz_t as one matrix product; numbers and bias summed on the way

Shapes as in `common.recurrence.stair_recurrence`. How the call itself is fast is told in native.cpp.

Memory, in arrays of T·B·H numbers, beside x and the gradient that comes in; x itself is not kept:

    rule "scale"         forward h, backward h and δz. From h = ρ φ follow φ and its slope, so z is not stored,
                         except at steps where ρ_t is 0 or nearly so
    the other rules      forward h and z, backward z and δz. h cannot be inverted there, so z is kept, and h is
                         formed again from it, some steps at a time, for dW. With last_only h is never stored
    without gradients    h; with last_only two states (B, H)

The code is compiled on first use, in a few seconds, by the compiler that $CXX names or else c++, g++ or clang++, as
a plain shared library, and kept in $XDG_CACHE_HOME/stair-rnn (~/.cache/stair-rnn). A library's file name holds a
digest of what it was made from (source, compiler, flags, processor) and one of its own bytes. It is loaded only
if both fit and used only after it has agreed with the PyTorch engine on a small problem.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from common.recurrence.torch_engine import sequence_recurrence
from common.stair import NONLINEARITIES, RULES

SOURCE = Path(__file__).with_name("native.cpp")
SCALARS = {torch.float32: "float", torch.float64: "double"}
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-w")
# Tuned for some processors, GCC splits a lone chain of multiply-adds, and a tile of one row would round otherwise than
# a tile of six. The parameter forbids that; Clang does not do it and ignores the parameter.
SAME_ROUNDING = "--param=avoid-fma-max-bits=0"
# the first that the compiler accepts
PROCESSOR_FLAGS = (("-march=native", SAME_ROUNDING), ("-march=native",), ("-mcpu=native",), ())
COMPILE_SECONDS = 300

WORK_PER_THREAD = 2**20  # multiply-adds; with less of them a thread costs more than it brings
CHUNK_ELEMENTS = 2**22   # numbers of h formed again at a time
# |ρ| below which φ = h / ρ could not be read from h
VANISHING = {dtype: torch.finfo(dtype).tiny ** 0.5 for dtype in SCALARS}

_SAID = []               # the one line about a missing engine, once it is said


class Unavailable(Exception):
    """Why there is no native engine here, in a sentence."""


# ── the recurrence ───────────────────────────────────────────────────────────────────────────────────────


def native_recurrence(x, kernel, h0, numbers, rule, phi, bias, last_only):
    """Arguments and result as in `common.recurrence.stair_recurrence`; numbers (T,).

    Raises ValueError for tensors that are not all float32 or all float64 on the CPU or do not fit together, and
    RuntimeError if the engine could not be built.
    """
    tensors = [t for t in (x, kernel, h0, numbers, bias) if t is not None]
    if x.dtype not in SCALARS or any(t.dtype != x.dtype or t.device.type != "cpu" for t in tensors):
        found = ", ".join(sorted({f"{t.dtype} on {t.device}" for t in tensors}))
        raise ValueError(f"the native engine needs float32 or float64 tensors, all alike, on the CPU; got {found}")
    steps, batch, hidden = x.shape
    if (kernel.shape, h0.shape, numbers.shape) != ((hidden, hidden), (batch, hidden), (steps,)):
        raise ValueError(f"x {tuple(x.shape)} does not fit kernel {tuple(kernel.shape)}, h0 {tuple(h0.shape)} "
                         f"and numbers {tuple(numbers.shape)}")
    if (phi == "modrelu") != (bias is not None) or (bias is not None and bias.shape != (hidden,)):
        raise ValueError(f"modrelu needs a bias ({hidden},), the other nonlinearities none; got {phi} and "
                         f"{None if bias is None else tuple(bias.shape)}")
    library, reason = _library(x.dtype)
    if library is None:
        raise RuntimeError(f"the native engine is not available: {reason}; use engine='torch'")
    return _recurrence(library, x, kernel, h0, numbers, rule, phi, bias, last_only)


def serves(x: torch.Tensor) -> bool:
    """Whether the native engine can run on tensors like x. Builds it on the first call; one line says if it cannot."""
    if x.device.type != "cpu" or x.dtype not in SCALARS:
        return False
    library, reason = _library(x.dtype)
    if library is None:
        _say_once(f"stair: running the PyTorch engine, the native one is not available: {reason}")
    return library is not None


def _say_once(line):
    if not _SAID:
        _SAID.append(line)
        print(line, file=sys.stderr, flush=True)


def _recurrence(library, x, kernel, h0, numbers, rule, phi, bias, last_only):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, kernel, h0, numbers, bias)):
        return _Sequence.apply(x, kernel, h0, numbers, bias, rule, phi, last_only, library)
    problem = Problem(library, kernel, h0, numbers, rule, phi, bias, steps=len(x))
    h, last = problem.forward(x, z=None, keep_h=not last_only, keep_last=last_only)
    return last if last_only else h


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, h0, numbers, bias, rule, phi, last_only, library):
        problem = Problem(library, kernel, h0, numbers, rule, phi, bias, steps=len(x))
        kept = problem.steps_that_need_z()
        z = None if kept is None else x.new_empty(int(kept.max()) + 1, *h0.shape)            # (T or fewer, B, H)
        h, last = problem.forward(x, z, keep_h=rule == "scale" or not last_only, keep_last=last_only)
        ctx.rule, ctx.phi, ctx.last_only, ctx.library, ctx.steps, ctx.kept = rule, phi, last_only, library, len(x), kept
        ctx.save_for_backward(kernel, h0, numbers, bias, h if rule == "scale" else None, z)
        return last if last_only else h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kernel, h0, numbers, bias, h, z = ctx.saved_tensors
        need_x, need_kernel, need_h0, need_numbers, need_bias = ctx.needs_input_grad[:5]
        problem = Problem(ctx.library, kernel, h0, numbers, ctx.rule, ctx.phi, bias, steps=ctx.steps)
        problem.keep(ctx.kept)
        d_h0 = torch.empty_like(h0, memory_format=torch.contiguous_format) if need_h0 else None
        number_parts = numbers.new_empty(ctx.steps, len(h0), dtype=torch.float64) if need_numbers else None  # (T, B)
        bias_parts = h0.new_zeros(h0.shape) if need_bias else None                                         # (B, H)
        dz = problem.backward(grad, ctx.last_only, h, z, d_h0, number_parts, bias_parts)                   # (T, B, H)

        d_kernel = problem.kernel_gradient(h, z, dz) if need_kernel else None
        d_numbers = number_parts.sum(1).to(numbers.dtype) if need_numbers else None
        d_bias = bias_parts.sum(0, dtype=torch.float64).to(bias.dtype) if need_bias else None
        return dz if need_x else None, d_kernel, d_h0, d_numbers, d_bias, None, None, None, None


class Call(ctypes.Structure):
    """The C++ struct of the same name, field by field."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "steps", "batch", "hidden", "threads", "rule", "phi",
        "kernel_in", "kernel_out", "x_step", "x_row", "h0_row", "grad_step", "grad_row")]
    _fields_ += [(name, ctypes.c_void_p) for name in (
        "openmp_parallel", "kernel", "x", "h0", "numbers", "bias", "kept", "h", "last", "z",
        "grad", "grad_last", "dz", "d_h0", "number_parts", "bias_parts")]


def _rows(tensor):
    """The tensor itself if its last dimension is contiguous, as native.cpp needs it, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


class Problem:
    """One sequence, as native.cpp wants to be told about it."""

    def __init__(self, library, kernel, h0, numbers, rule, phi, bias, steps):
        batch, hidden = h0.shape
        self.library, self.rule = library, rule
        self.h0, self.numbers = _rows(h0), numbers.contiguous()
        self.alive = [kernel, bias := None if bias is None else bias.contiguous()]  # until the call is over
        threads = min(torch.get_num_threads(), steps * batch * hidden**2 // WORK_PER_THREAD)
        self.call = Call(
            steps=steps, batch=batch, hidden=hidden, threads=max(1, threads),
            rule=RULES.index(rule), phi=NONLINEARITIES.index(phi), openmp_parallel=_openmp_parallel(),
            kernel=_address(kernel), kernel_in=kernel.stride(0), kernel_out=kernel.stride(1),
            h0=_address(self.h0), h0_row=self.h0.stride(0), numbers=_address(self.numbers), bias=_address(bias))

    def keep(self, kept):
        self.alive.append(kept)
        self.call.kept = _address(kept)

    def steps_that_need_z(self):
        """The place of z_t among the kept ones, or −1, for every step → (T,) int64; None if none is kept."""
        if self.rule != "scale":
            kept = torch.arange(self.call.steps)
        else:
            size, limit = self.numbers.abs(), VANISHING[self.numbers.dtype]
            if not size.min().item() < limit:
                return None
            kept = torch.where(size < limit, (size < limit).cumsum(0) - 1, -1)
        self.keep(kept)
        return kept

    def forward(self, x, z, keep_h, keep_last):
        """Fills z where kept; → h (T, B, H) or None, the last state (B, H) or None."""
        x = _rows(x)
        h = x.new_empty(x.shape) if keep_h else None
        last = x.new_empty(x.shape[1:]) if keep_last else None
        call = self.call
        call.x, call.x_step, call.x_row = _address(x), x.stride(0), x.stride(1)
        call.h, call.last, call.z = _address(h), _address(last), _address(z)
        self.library.run("forward", call)
        return h, last

    def backward(self, grad, last_only, h, z, d_h0, number_parts, bias_parts):
        """Fills the last three where given; → δz (T, B, H)."""
        grad = _rows(grad)
        call = self.call
        dz = grad.new_empty(call.steps, call.batch, call.hidden)
        if last_only:
            call.grad_last, call.grad_row = _address(grad), grad.stride(0)
        else:
            call.grad, call.grad_step, call.grad_row = _address(grad), grad.stride(0), grad.stride(1)
        call.h, call.z, call.dz, call.d_h0 = map(_address, (h, z, dz, d_h0))
        call.number_parts, call.bias_parts = _address(number_parts), _address(bias_parts)
        self.library.run("backward", call)
        return dz

    def kernel_gradient(self, h, z, dz):
        """dW = Σ_t h_{t-1}ᵀ δz_t → (H, H), with h_{t-1} formed again from z where h was not kept."""
        steps, _, hidden = dz.shape
        d_kernel = self.h0.t() @ dz[0]
        if steps == 1:
            return d_kernel
        if h is not None:
            return d_kernel.addmm_(h[:-1].view(-1, hidden).t(), dz[1:].view(-1, hidden))
        chunk = max(1, CHUNK_ELEMENTS // dz[0].numel())
        states = torch.empty_like(z[:chunk])
        for start in range(0, steps - 1, chunk):
            end = min(start + chunk, steps - 1)
            call = self.call
            call.steps, call.numbers = end - start, _address(self.numbers[start:])
            call.h, call.z = _address(states), _address(z[start:])
            self.library.run("states", call)
            d_kernel.addmm_(states[:end - start].view(-1, hidden).t(), dz[start + 1:end + 1].view(-1, hidden))
        return d_kernel


# ── the library ──────────────────────────────────────────────────────────────────────────────────────────


class Library:
    """native.cpp, compiled and loaded."""

    def __init__(self, path: Path):
        loaded = ctypes.CDLL(str(path))
        self.entries = {name: getattr(loaded, f"stair_{name}") for name in ("forward", "backward", "states")}
        for entry in self.entries.values():
            entry.argtypes, entry.restype = [ctypes.POINTER(Call)], ctypes.c_int

    def run(self, name, call):
        if self.entries[name](ctypes.byref(call)):
            raise MemoryError("the native recurrence ran out of memory")


@functools.cache
def _openmp_parallel() -> int | None:
    """The address of the function that starts a parallel region in the OpenMP runtime that torch has loaded, if any."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, TypeError, AttributeError):
        return None


@functools.cache
def _library(dtype):
    """→ (Library, None), or (None, why not). Built at most once per process and dtype."""
    try:
        return _load_or_build(dtype), None
    except Unavailable as reason:
        return None, str(reason)
    except OSError as error:  # a full disk, say
        return None, f"it could not be built: {error}"


def _load_or_build(dtype) -> Library:
    if os.name == "nt":
        raise Unavailable("it is not made for Windows")
    compiler = _compiler()
    name = f"{SCALARS[dtype]}-{_key(compiler, dtype)}"
    with contextlib.ExitStack() as stack:
        cache = _cache_folder() or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stair-rnn-")))
        for path in sorted(cache.glob(f"{name}-*.so")):
            if library := _load(path, dtype):
                return library
            with contextlib.suppress(OSError):
                path.unlink()  # damaged: it would be found again by every run
        if library := _load(_build(compiler, dtype, cache, name), dtype):
            return library
    raise Unavailable("the compiled library does not load, or disagrees with the PyTorch engine")


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX", "").strip()
    for command in [shlex.split(wanted)] if wanted else [[name] for name in COMPILERS]:
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
    """The processor and what it can do: code compiled for one may stop another."""
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


def _cache_folder() -> Path | None:
    """The user's cache folder for compiled code, or None if it cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stair-rnn"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None


def _build(compiler, dtype, cache, name) -> Path:
    """Compile under a temporary name, then rename: another run sees the whole library or none."""
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
                path = cache / f"{name}-{_digest(made)}.so"
                os.replace(made, path)
                return path
    complaint = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
    raise Unavailable(f"'{shlex.join(compiler)}' could not compile {SOURCE.name}: {complaint.strip()}")


def _digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _load(path, dtype) -> Library | None:
    """The library at `path` if its bytes are those its name tells of, it loads, and it computes the right numbers."""
    try:
        if _digest(path) != path.stem.rpartition("-")[2]:
            return None
        library = Library(path)
    except (OSError, AttributeError):
        return None
    return library if _agrees(library, dtype) else None


def _agrees(library, dtype) -> bool:
    """Whether forward and backward give the PyTorch engine's numbers on two small problems of odd sizes."""
    steps, batch, hidden = 3, 7, 21
    tolerance = 1e-4 if dtype is torch.float32 else 1e-10
    with torch.inference_mode(False), torch.enable_grad():
        def waves(*shape, start):
            count = torch.Size(shape).numel()
            return torch.sin(torch.arange(start, start + count, dtype=dtype, device="cpu") ** 1.1).view(shape)

        for rule, phi, last_only in (("scale", "modrelu", False), ("exponential", "tanh", True)):
            bias = waves(hidden, start=5) / 100 if phi == "modrelu" else None
            inputs = [waves(steps, batch, hidden, start=1), waves(hidden, hidden, start=2) / 4,
                      waves(batch, hidden, start=3), waves(steps, start=4).abs() + 0.5]
            results = []
            for engine in (functools.partial(_recurrence, library), sequence_recurrence):
                leaves = [t.clone().requires_grad_() for t in inputs]
                b = None if bias is None else bias.clone().requires_grad_()
                h = engine(*leaves, rule, phi, b, last_only)
                (h * torch.cos(h.detach())).sum().backward()
                results.append([h.detach(), *(t.grad for t in leaves), *([] if b is None else [b.grad])])
            for ours, theirs in zip(*results, strict=True):
                if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance):
                    return False
    return True
