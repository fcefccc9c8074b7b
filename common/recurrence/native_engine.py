"""The native CPU engine: the whole sequence, forward or backward, in one call of compiled code (native.cpp).

Beside the recurrence, what else a step of a small network spends its time with: exp(S) and its adjoint.

    forward     z_t = x_t + h_{t-1} W,  h_t = g_t(z_t) φ(z_t)                         all t in one call
    backward    δh_t = ∂L/∂h_t + δz_{t+1} Wᵀ,  δz_t = δh_t · ∂h_t/∂z_t                 all t in one call
    gradients   dW = Σ_t h_{t-1}ᵀ δz_t in one more; numbers and bias summed on the way

Shapes as in `common.recurrence.stair_recurrence`. How the call itself is fast is told in native.cpp.

Memory, in arrays of T·B·H numbers, beside x and the gradient that comes in; x itself is not kept:

    rule "scale"         forward h, backward h and δz. From h = ρ φ follow φ and its slope, so z is not stored,
                         except at steps where ρ_t is 0 or nearly so
    the other rules      forward h and z, backward z and δz. h cannot be inverted there, so z is kept, and h is
                         formed again from it, some steps at a time, for dW. With last_only h is never stored
    without gradients    h; with last_only two states (B, H)

The code is compiled on first use, by native_build.py.
"""

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable

from common.orthogonal import LARGEST_NORM, POLYNOMIAL, skew_exponential, triangle, triangle_indices
from common.recurrence import native_build
from common.recurrence.agreement import disagreement
from common.recurrence.native_build import SCALARS, Call
from common.stair import NONLINEARITIES, RULES

WORK_PER_THREAD = 2**20  # multiply-adds; with less of them a thread costs more than it brings
CHUNK_ELEMENTS = 2**22   # numbers of h formed again at a time
POLYNOMIALS = {dtype: (ctypes.c_double * 9)(*p, LARGEST_NORM[dtype]) for dtype, p in POLYNOMIAL.items()}
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
    if (kernel.shape, h0.shape, numbers.shape) != ((hidden, hidden), (batch, hidden), (steps,)):
        raise ValueError(f"x {tuple(x.shape)} does not fit kernel {tuple(kernel.shape)}, h0 {tuple(h0.shape)} "
                         f"and numbers {tuple(numbers.shape)}")
    if (phi == "modrelu") != (bias is not None) or (bias is not None and bias.shape != (hidden,)):
        raise ValueError(f"modrelu needs a bias ({hidden},), the other nonlinearities none; got {phi} and "
                         f"{None if bias is None else tuple(bias.shape)}")
    library, reason = _library(x.dtype)
    if library is None:
        raise RuntimeError(_unavailable(reason))
    return _recurrence(library, x, kernel, h0, numbers, rule, phi, bias, last_only)


def unavailable_reason(device) -> str | None:
    """Why the engine cannot run on `device`, in a sentence; None if it can. Builds it on the first call."""
    if torch.device(device).type != "cpu":
        return "the native engine runs on the CPU; choose the engine auto or torch for a GPU"
    _, reason = _library(torch.float32)
    return None if reason is None else _unavailable(reason)


def _unavailable(reason):
    return f"the native engine is not available: {reason}; choose the engine torch, which needs no compiler"


def serves(x: torch.Tensor) -> bool:
    """Whether the native engine can run on tensors like x. Builds it on the first call; one line says if it cannot."""
    if x.device.type != "cpu" or x.dtype not in SCALARS:
        return False
    library, reason = _library(x.dtype)
    if library is None:
        native_build.say_once(f"stair: running the PyTorch engine, the native one is not available: {reason}")
    return library is not None


def _recurrence(library, x, kernel, h0, numbers, rule, phi, bias, last_only):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, kernel, h0, numbers, bias)):
        return _Sequence.apply(x, kernel, h0, numbers, bias, rule, phi, last_only, library)
    problem = Problem(library, kernel, h0, numbers, rule, phi, bias, steps=x.shape[0])
    h, last = problem.forward(x, z=None, keep_h=not last_only, keep_last=last_only)
    return last if last_only else h


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, h0, numbers, bias, rule, phi, last_only, library):
        problem = Problem(library, kernel, h0, numbers, rule, phi, bias, steps=x.shape[0])
        kept = problem.steps_that_need_z()
        z = None if kept is None else x.new_empty(int(kept.max()) + 1, *h0.shape)            # (T or fewer, B, H)
        h, last = problem.forward(x, z, keep_h=rule == "scale" or not last_only, keep_last=last_only)
        ctx.rule, ctx.phi, ctx.last_only, ctx.library = rule, phi, last_only, library
        ctx.steps, ctx.kept = x.shape[0], kept
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
        d_numbers = numbers.new_empty(ctx.steps) if need_numbers else None
        d_bias = h0.new_empty(h0.shape[1]) if need_bias else None
        dz = problem.backward(grad, ctx.last_only, h, z, d_h0, d_numbers, d_bias)                          # (T, B, H)
        d_kernel = problem.kernel_gradient(h, z, dz) if need_kernel else None
        return dz if need_x else None, d_kernel, d_h0, d_numbers, d_bias, None, None, None, None


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
            rule=RULES.index(rule), phi=NONLINEARITIES.index(phi), openmp_parallel=native_build.openmp_parallel(),
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
            limit = VANISHING[self.numbers.dtype]
            if not self.library.smallest(self.call.numbers, self.call.steps) < limit:
                return None
            vanishes = self.numbers.abs() < limit
            kept = torch.where(vanishes, vanishes.cumsum(0) - 1, -1)
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

    def backward(self, grad, last_only, h, z, d_h0, d_numbers, d_bias):
        """Fills the last three where given; → δz (T, B, H)."""
        grad = _rows(grad)
        call = self.call
        dz = grad.new_empty(call.steps, call.batch, call.hidden)
        if last_only:
            call.grad_last, call.grad_row = _address(grad), grad.stride(0)
        else:
            call.grad, call.grad_step, call.grad_row = _address(grad), grad.stride(0), grad.stride(1)
        call.h, call.z, call.dz, call.d_h0 = map(_address, (h, z, dz, d_h0))
        call.d_numbers, call.d_bias = _address(d_numbers), _address(d_bias)
        self.library.run("backward", call)
        call.d_numbers = call.d_bias = None
        return dz

    def kernel_gradient(self, h, z, dz):
        """dW = Σ_t h_{t-1}ᵀ δz_t → (H, H), with h_{t-1} formed again from z where h was not kept."""
        call, steps, hidden = self.call, len(dz), dz.shape[-1]
        d_kernel = dz.new_zeros(hidden, hidden)
        call.d_kernel, call.dz, call.h = _address(d_kernel), _address(dz), _address(h)
        if h is not None:
            self.library.run("kernel_gradient", call)
            return d_kernel
        call.steps = 1
        self.library.run("kernel_gradient", call)                                                          # of h0
        call.h0 = None
        chunk = max(1, CHUNK_ELEMENTS // dz[0].numel())
        states = torch.empty_like(z[:chunk])
        call.h = _address(states)
        for start in range(0, steps - 1, chunk):
            call.steps, call.numbers = min(chunk, steps - 1 - start), _address(self.numbers[start:])
            call.z, call.dz = _address(z[start:]), _address(dz[start + 1:])
            self.library.run("states", call)
            self.library.run("kernel_gradient", call)
        return d_kernel


# ── the exponential ──────────────────────────────────────────────────────────────────────────────────────


def native_exponential(logarithm: torch.Tensor, size: int) -> torch.Tensor:
    """`common.orthogonal.skew_exponential` of the S (size, size) whose numbers above the diagonal are `logarithm`.

    The same formulas. Raises RuntimeError if the engine could not be built.
    """
    library, reason = _library(logarithm.dtype)
    if library is None:
        raise RuntimeError(_unavailable(reason))
    return _Exponential.apply(logarithm, size, library)


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logarithm, size, library):
        logarithm = logarithm.contiguous()
        squares, rotation = logarithm.new_empty(2, size, size), logarithm.new_empty(size, size)
        ctx.library, ctx.call = library, (call := _call(size**3, hidden=size))
        call.polynomial = ctypes.addressof(POLYNOMIALS[logarithm.dtype])
        call.logarithm, call.squares, call.rotation = map(_address, (logarithm, squares, rotation))
        library.run("square", call)
        kept = logarithm.new_empty(3 + call.squarings, size, size)
        call.kept_products = _address(kept)
        library.run("exponential", call)
        ctx.save_for_backward(squares, kept)
        return rotation

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        squares, kept = ctx.saved_tensors
        size = grad.shape[0]
        grad, room = grad.contiguous(), grad.new_empty(6, size, size)
        d_logarithm = grad.new_empty(size * (size - 1) // 2)
        call = ctx.call
        call.squares, call.kept_products, call.grad_rotation = map(_address, (squares, kept, grad))
        call.room, call.d_logarithm = _address(room), _address(d_logarithm)
        ctx.library.run("exponential_backward", call)
        return d_logarithm, None, None


def _call(work: int, **sizes) -> Call:
    """A call of so many multiply-adds, which decide about its threads."""
    threads = min(torch.get_num_threads(), work // WORK_PER_THREAD)
    return Call(threads=max(1, threads), openmp_parallel=native_build.openmp_parallel(), **sizes)


def multiply_adds(rounds: int) -> float:
    """Do nothing but `rounds` rounds of independent float32 multiply-adds, the yardstick → how many operations.

    Raises RuntimeError if the engine could not be built.
    """
    library, reason = _library(torch.float32)
    if library is None:
        raise RuntimeError(_unavailable(reason))
    return library.multiply_adds(rounds)


# ── the library ──────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _library(dtype):
    """→ (Library, None), or (None, why not). Built at most once per process and dtype."""
    try:
        return native_build.load_or_build(dtype, functools.partial(_agrees, dtype=dtype)), None
    except native_build.Unavailable as reason:
        return None, str(reason)
    except OSError as error:  # a full disk, say
        return None, f"it could not be built: {error}"


def _agrees(library, dtype) -> bool:
    """Whether the recurrence and exp(S) are right on small problems of odd sizes."""
    engine, size = functools.partial(_recurrence, library), 21
    for rule, phi in (("scale", "modrelu"), ("exponential", "tanh")):
        if disagreement(engine, 3, 7, size, rule, phi, dtype) is not None:
            return False
    with torch.inference_mode(False), torch.enable_grad():
        indices = triangle_indices(size, "cpu")
        logarithm = torch.sin(torch.arange(6, 6 + len(indices), dtype=dtype, device="cpu") ** 1.1).requires_grad_()
        upper = triangle(logarithm, indices, size)
        results = []
        for w in (_Exponential.apply(logarithm, size, library), skew_exponential(upper - upper.t())):
            results.append([w.detach(), *torch.autograd.grad((w * torch.cos(w.detach())).sum(), logarithm)])
    tolerance = 1e-4 if dtype is torch.float32 else 1e-10
    return all(torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
               for ours, theirs in zip(*results, strict=True))
