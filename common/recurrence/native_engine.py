"""The native CPU engine: the whole sequence, forward or backward, in one call of compiled code (native.cpp).

Beside the recurrence, what else a step of a small network spends its time with: exp(S) and its adjoint.

    forward     z_t = x_t + h_{t-1} W,  h_t = g_t(z_t) φ(z_t)                         all t in one call
    backward    δh_t = ∂L/∂h_t + δz_{t+1} Wᵀ,  δz_t = δh_t · ∂h_t/∂z_t                 all t in one call
    gradients   dW = Σ_t h_{t-1}ᵀ δz_t in one more; numbers and bias summed on the way

Shapes as in `common.recurrence.stair_recurrence`. How the call itself is fast is told in native.cpp.

Memory, in arrays of T·B·H numbers, beside x and the gradient that comes in; x itself is not kept:

    rule "scale"         forward h, backward h and δz: from h = ρ φ follow φ and its slope, where no ρ_t is nearly 0
    the other rules      forward h and z, or only z with last_only; backward z and δz. h is formed again for dW
    without gradients    h; with last_only two states (B, H)
"""

import ctypes
import functools
import re
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from common.orthogonal import LARGEST_NORM, POLYNOMIAL, skew_exponential, triangle, triangle_indices
from common.recurrence.agreement import ChildFailed, disagreement, in_child
from common.recurrence.native_build import Unavailable, load_or_build, say_once
from common.stair import NONLINEARITIES, RULES

SOURCE = Path(__file__).with_name("native.cpp")
SCALARS = {torch.float32: "float", torch.float64: "double"}
# The formulas that are written again here and in triton_kernels.py. A name that is new in common/stair.py is none.
COMPILED_RULES = ("scale", "exponential", "literal")
COMPILED_NONLINEARITIES = ("none", "tanh", "relu", "modrelu", "sigmoid")
WORK_PER_THREAD = 2**20  # multiply-adds; with less of them a thread costs more than it brings
CHUNK_ELEMENTS = 2**22   # numbers of h formed again at a time
POLYNOMIALS = {dtype: (ctypes.c_double * 8)(*POLYNOMIAL[dtype]) for dtype in POLYNOMIAL}
# |ρ| below which φ = h / ρ could not be read from h
VANISHING = {dtype: torch.finfo(dtype).tiny ** 0.5 for dtype in SCALARS}


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
    needed = [(steps, batch, hidden), (hidden, hidden), (batch, hidden), (steps,), *[(hidden,)] * (phi == "modrelu")]
    if (found := [tuple(t.shape) for t in tensors]) != needed:
        raise ValueError(f"{phi} needs tensors of the shapes {needed}; got {found}")
    return _recurrence(_available(x.dtype), x, kernel, h0, numbers, rule, phi, bias, last_only)


def unavailable_reason(device, dtype=torch.float32) -> str | None:
    """Why the engine cannot run on `device`, in a sentence; None if it can. Builds it on the first call."""
    if torch.device(device).type != "cpu":
        return "the native engine runs on the CPU; choose the engine auto or torch for a GPU"
    if isinstance(reason := _library(dtype), Library):
        return None
    return f"the native engine is not available: {reason}; choose the engine torch, which needs no compiler"


def serves(x: torch.Tensor) -> bool:
    """Whether the native engine can run on tensors like x. Builds it on the first call; one line says if it cannot."""
    if x.device.type != "cpu" or x.dtype not in SCALARS:
        return False
    if not isinstance(reason := _library(x.dtype), Library):
        say_once(f"stair: running the PyTorch engine, the native one is not available: {reason}")
    return isinstance(reason, Library)


def _available(dtype) -> "Library":
    if (reason := unavailable_reason("cpu", dtype)) is not None:
        raise RuntimeError(reason)
    return _library(dtype)


def _recurrence(library, x, kernel, h0, numbers, rule, phi, bias, last_only):
    h0, numbers, bias = _rows(h0), numbers.contiguous(), None if bias is None else bias.contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, kernel, h0, numbers, bias)):
        return _Sequence.apply(x, kernel, h0, numbers, bias, rule, phi, last_only, library)
    h, last = _forward(library, x, kernel, h0, numbers, bias, rule, phi, None, not last_only, last_only)
    return last if last_only else h


def _problem(kernel, numbers, rule, phi, bias, steps, batch, hidden) -> dict:
    """What both passes are told. Without a kernel z is x."""
    kernel_in, kernel_out = (0, 0) if kernel is None else kernel.stride()
    return dict(rule=list(RULES).index(rule), phi=list(NONLINEARITIES).index(phi), steps=steps, batch=batch,
                hidden=hidden, kernel=kernel, kernel_in=kernel_in, kernel_out=kernel_out, numbers=numbers, bias=bias,
                **_threads(steps * batch * hidden**2))


def _forward(library, x, kernel, h0, numbers, bias, rule, phi, z, keep_h, keep_last):
    """Fills z if given; → h (T, B, H) or None, the last state (B, H) or None."""
    x = _rows(x)
    h = x.new_empty(x.shape) if keep_h else None
    last = x.new_empty(h0.shape) if keep_last else None
    library.forward(**_problem(kernel, numbers, rule, phi, bias, *x.shape), x=x, x_step=x.stride(0), x_row=x.stride(1),
                    h0=h0, h0_row=h0.stride(0), z=z, h=h, last=last)
    return h, last


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, h0, numbers, bias, rule, phi, last_only, library):
        from_h = rule == "scale" and not (numbers.abs() < VANISHING[numbers.dtype]).any()
        z = None if from_h else x.new_empty(x.shape)                                                       # (T, B, H)
        h, last = _forward(library, x, kernel, h0, numbers, bias, rule, phi, z, from_h or not last_only, last_only)
        ctx.rule, ctx.phi, ctx.last_only, ctx.library = rule, phi, last_only, library
        ctx.save_for_backward(kernel, h0, numbers, bias, h if from_h else None, z)
        return last if last_only else h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kernel, h0, numbers, bias, h, z = ctx.saved_tensors
        need_x, need_kernel, need_h0, need_numbers, need_bias = ctx.needs_input_grad[:5]
        grad, dz = _rows(grad), grad.new_empty(len(numbers), *h0.shape)                                    # (T, B, H)
        d_h0 = torch.empty_like(h0, memory_format=torch.contiguous_format) if need_h0 else None
        d_numbers = torch.empty_like(numbers) if need_numbers else None
        d_bias = torch.empty_like(bias) if need_bias else None
        ctx.library.backward(**_problem(kernel, numbers, ctx.rule, ctx.phi, bias, *dz.shape), grad=grad,
                             grad_step=grad.stride(0), grad_row=grad.stride(-2), last_only=ctx.last_only,
                             z=z, h=h, dz=dz, d_h0=d_h0, d_numbers=d_numbers, d_bias=d_bias)
        d_kernel = None
        if need_kernel:
            d_kernel = _kernel_gradient(ctx.library, h0, numbers, bias, ctx.rule, ctx.phi, h, z, dz)
        return dz if need_x else None, d_kernel, d_h0, d_numbers, d_bias, None, None, None, None


def _kernel_gradient(library, h0, numbers, bias, rule, phi, h, z, dz):
    """dW = Σ_t h_{t-1}ᵀ δz_t → (H, H), with h_{t-1} formed again from z where h was not kept."""
    (steps, batch, hidden), d_kernel = dz.shape, dz.new_zeros(dz.shape[-1], dz.shape[-1])

    def add(count, previous, row, dz):
        library.kernel_gradient(rows=count, hidden=hidden, **_threads(count * hidden**2), previous=previous,
                                previous_row=row, dz=dz, d_kernel=d_kernel)

    add(batch, h0, h0.stride(0), dz)
    if h is not None:
        add((steps - 1) * batch, h, hidden, dz[1:])
        return d_kernel
    chunk = max(1, CHUNK_ELEMENTS // max(1, batch * hidden))
    for start in range(0, steps - 1, chunk):
        z_chunk, numbers_chunk = z[start:min(start + chunk, steps - 1)], numbers[start:]
        states, _ = _forward(library, z_chunk, None, h0, numbers_chunk, bias, rule, phi, None, True, False)
        add(len(states) * batch, states, hidden, dz[start + 1:])
    return d_kernel


def _rows(tensor):
    """The tensor itself if its last dimension is contiguous, as native.cpp needs it, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def native_exponential(logarithm: torch.Tensor, size: int) -> torch.Tensor:
    """`common.orthogonal.skew_exponential` of the S (size, size) whose numbers above the diagonal are `logarithm`.

    The same formulas. Raises RuntimeError if the engine could not be built.
    """
    return _Exponential.apply(logarithm, size, _available(logarithm.dtype))


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logarithm, size, library):
        logarithm, matrix = logarithm.contiguous(), dict(hidden=size, **_threads(size**3))
        squares, rotation = logarithm.new_empty(2, size, size), logarithm.new_empty(size, size)
        matrix["squarings"] = library.square(**matrix, largest_norm=LARGEST_NORM[logarithm.dtype], logarithm=logarithm,
                                             squares=squares)
        matrix["polynomial"] = ctypes.addressof(POLYNOMIALS[logarithm.dtype])
        kept = logarithm.new_empty(3 + matrix["squarings"], size, size)
        library.exponential(**matrix, squares=squares, kept=kept, rotation=rotation)
        ctx.library, ctx.matrix = library, matrix
        ctx.save_for_backward(squares, kept)
        return rotation

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        squares, kept = ctx.saved_tensors
        size = grad.shape[0]
        room, d_logarithm = grad.new_empty(6, size, size), grad.new_empty(size * (size - 1) // 2)
        ctx.library.exponential_backward(**ctx.matrix, squares=squares, kept=kept, grad_rotation=grad.contiguous(),
                                         room=room, d_logarithm=d_logarithm)
        return d_logarithm, None, None


ENTRY = re.compile(r"^std::int64_t stair_(\w+)\(([^)]*)\)", re.MULTILINE)
TYPES = {"std::int64_t": ctypes.c_int64, "double": ctypes.c_double}


class Library:
    """native.cpp, compiled and loaded: library.forward(rule=…, phi=…, …) with every argument by its name.

    The names and their order are those of the entry points in native.cpp. An argument is a number, a tensor or None.
    """

    def __init__(self, loaded: ctypes.CDLL):
        for name, listed in ENTRY.findall(SOURCE.read_text(encoding="utf-8")):
            types = dict(reversed(argument.strip().rsplit(None, 1)) for argument in listed.split(","))
            entry = getattr(loaded, f"stair_{name}")
            entry.restype = ctypes.c_int64
            entry.argtypes = [TYPES.get(kind, ctypes.c_void_p) for kind in types.values()]         # else a pointer
            setattr(self, name, functools.partial(self._call, entry, [argument.lstrip("*") for argument in types]))

    @staticmethod
    def _call(entry, names, **given):
        """→ what the entry point returns. `given` stays alive until then."""
        found = entry(*[t.data_ptr() if torch.is_tensor(t := given[name]) else t for name in names])
        if len(given) != len(names):
            raise TypeError(f"unknown arguments: {sorted(given.keys() - names)}")
        if found == -1:
            raise MemoryError("the native engine ran out of memory")
        if found == -2:
            raise ValueError("the native engine has no such rule or nonlinearity")
        return found


@functools.cache
def _openmp_parallel() -> int | None:
    """The address of the function that starts a parallel region in the OpenMP runtime that torch has loaded, if any."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, TypeError, AttributeError):
        return None


def _threads(work: int) -> dict:
    """The threads of a call of so many multiply-adds."""
    return dict(threads=max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD)), parallel=_openmp_parallel())


@functools.cache
def _library(dtype) -> "Library | str":
    """The library, or why there is none. Built at most once per process and dtype."""
    places = {name: place for names in (RULES, NONLINEARITIES) for place, name in enumerate(names)
              if name in COMPILED_RULES + COMPILED_NONLINEARITIES}
    defines = [f"STAIR_SCALAR={SCALARS[dtype]}", *(f"STAIR_{name.upper()}={place}" for name, place in places.items())]
    try:
        return Library(load_or_build(SOURCE, defines, functools.partial(_trial, SCALARS[dtype])))
    except Unavailable as reason:
        return str(reason)
    except OSError as error:  # a full disk, say
        return f"it could not be built: {error}"


def _trial(scalar: str, path: Path) -> str | None:
    """What is wrong with a new library, found in a process of its own, which a wrong library may end."""
    try:
        return in_child(__name__, "wrong_numbers", str(path), scalar)
    except ChildFailed as error:
        return str(error)


def wrong_numbers(path: str, scalar: str) -> str | None:
    """What is wrong with the recurrence or exp(S) of the library at `path`, in words; None if nothing is."""
    try:
        library = Library(ctypes.CDLL(path))
    except (OSError, AttributeError) as error:
        return f"it does not load: {error}"
    dtype, size = {name: dtype for dtype, name in SCALARS.items()}[scalar], 21
    engine = functools.partial(_recurrence, library)
    for rule in COMPILED_RULES:
        for phi in COMPILED_NONLINEARITIES:
            if (wrong := disagreement(engine, 7, size, rule, phi, dtype, steps=20, repetitions=2)) is not None:
                return f"with rule {rule} and nonlinearity {phi} {wrong}"
    indices = triangle_indices(size, "cpu")
    logarithm = torch.sin(torch.arange(6, 6 + len(indices), dtype=dtype) ** 1.1).requires_grad_()
    upper = triangle(logarithm, indices, size)
    tolerance, results = 1e-4 if dtype is torch.float32 else 1e-10, []
    for w in (_Exponential.apply(logarithm, size, library), skew_exponential(upper - upper.t())):
        results.append([w.detach(), *torch.autograd.grad((w * torch.cos(w.detach())).sum(), logarithm)])
    same = all(torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
               for ours, theirs in zip(*results, strict=True))
    return None if same else "exp(S) is not that of common/orthogonal.py"
