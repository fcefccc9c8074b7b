"""The triton engine for a GPU: the whole sequence, forward or backward, in one launch (triton_kernels.py).

    forward     z_t = x_t + h_{t-1} W,  h_t = g_t(z_t) φ(z_t)                         all t in one launch
    backward    δh_t = ∂L/∂h_t + δz_{t+1} Wᵀ,  δz_t = δh_t · ∂h_t/∂z_t                 all t in one launch
    gradients   dW = Σ_t h_{t-1}ᵀ δz_t as one matrix product; numbers and bias summed on the way

**Who does what.** A launch has parts × groups programs. A part owns some columns of W, which it keeps on chip from
the first step to the last; a group owns some blocks of batch rows, and rows are independent, so groups never meet.
Inside a group every part needs the h_{t-1} of all parts: each writes its own columns to memory, adds one to the
counter of the row block, and waits until the counter says that all have. A step waits once; where a group has several
row blocks, it works on another block meanwhile. With H ≤ 128 in float32 there is one part, and nobody waits.

**It cannot hang.** Programs that wait for each other must all be on the GPU at once, so a launch never has more of
them than the GPU has multiprocessors, each fits on one by the rule of `Plan.shared`, and the launch is cooperative:
the driver refuses it where not all programs fit. Every wait has a bound, beyond which it ends in a CUDA error. Where W
takes more parts than there are multiprocessors, the same kernels are launched once a step and nobody waits. Where 16
columns of W do not fit on chip (in float32 above about H = 3300 on Hopper, 1280 with 99 KB of shared memory), the
PyTorch engine runs, and a line says so.

**The same bits.** No sum depends on an order that changes: no atomic addition to a float, partial sums are kept by
program and added up afterwards. Products are exact float32 unless `torch.set_float32_matmul_precision` asks for less,
which --tf32 does.

Memory, in arrays of T·B·H numbers, beside x and the gradient that comes in: forward h and z, backward h, z and δz;
without gradients h, or with last_only two states (B, H).

Where triton is missing, the PyTorch engine runs without a CUDA graph. A graph would save launches, but it needs the
same addresses and shapes every time: copies in and out, and memory of its own for every length and batch size. Triton
comes with every CUDA build of torch for Linux, so few users would gain from a graph.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from common.recurrence.agreement import disagreement
from common.recurrence.native_build import say_once
from common.recurrence.torch_engine import sequence_recurrence

DTYPES = (torch.float32, torch.float64)
DEPTH = 16                          # triton_kernels.DEPTH, which cannot be imported without triton
WIDTHS = (128, 64, 32, 16)          # columns of W a part may own
HEIGHTS = (4, 8, 16, 32)            # rows of a row block
STAGED = 64 * 1024                  # bytes of h that are fetched at a time, where there is room
TOLERATED = 1.1                     # a plan may do so many times the least arithmetic, for a better shape
REGISTERS = 65536                   # of a multiprocessor
HOPPER = (132, 227 * 1024)          # what the interpreter pretends to run on


def triton_recurrence(x, kernel, h0, numbers, rule, phi, bias, last_only):
    """Arguments and result as in `common.recurrence.stair_recurrence`; numbers (T,).

    Raises ValueError for tensors that are not all float32 or all float64 on one GPU, and where triton is missing.
    """
    tensors = [t for t in (x, kernel, h0, numbers, bias) if t is not None]
    if (reason := unavailable_reason(x.device)) is not None:
        raise ValueError(reason)
    if x.dtype not in DTYPES or any((t.dtype, t.device) != (x.dtype, x.device) for t in tensors):
        found = ", ".join(sorted({f"{t.dtype} on {t.device}" for t in tensors}))
        raise ValueError(f"the triton engine needs float32 or float64 tensors, all alike, on one GPU; got {found}")
    _, batch, hidden = x.shape
    plan = make_plan(batch, hidden, x.dtype, precision(), *capacity(x.device))
    if plan is None:
        say_once(f"stair: running the PyTorch engine, the triton one has no room for H = {hidden} in {x.dtype}")
        return sequence_recurrence(x, kernel, h0, numbers, rule, phi, bias, last_only)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Sequence.apply(x, kernel, h0, numbers, bias, rule, phi, last_only, plan)
    h = _forward(plan, x, kernel, h0, numbers, bias, rule, phi, z=None, keep_h=not last_only)
    return h[(len(x) - 1) % 2].clone() if last_only else h


def unavailable_reason(device) -> str | None:
    """Why the engine cannot run on `device`, in a sentence; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton engine needs the package triton, which is not installed; install it or take the engine auto"
    if torch.device(device).type != "cuda" and not interpreted():
        return f"the triton engine needs a GPU, not the {torch.device(device).type}; choose the engine auto there"
    return None


@functools.cache
def is_right(batch, hidden, rule, phi, dtype, device, precision) -> bool:
    """Whether the kernels compute the right numbers for this case on this GPU; one line says so if not.

    Asked once a process, before the first step. A launch that cannot end traps: the run then ends in a CUDA error
    before anything is written, and `--engine torch` goes around it.
    """
    if dtype not in DTYPES:
        return False
    reason = unavailable_reason(device)
    if reason is None and make_plan(batch, hidden, dtype, precision, *capacity(device)) is None:
        reason = f"it has no room for H = {hidden} in {dtype}"
    reason = reason or disagreement(triton_recurrence, 32, batch, hidden, rule, phi, dtype,
                                    "ieee" if dtype is torch.float64 else precision, device)
    if reason is not None:
        say_once(f"stair: running the PyTorch engine; triton: {reason}")
    return reason is None


def interpreted() -> bool:
    """Whether triton runs its kernels in Python, as its variable TRITON_INTERPRET asks it to, on the CPU too."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def precision() -> str:
    """How float32 products are formed: exactly, or by tensor cores from 10 bits of mantissa."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def _kernels():
    from common.recurrence import triton_kernels

    return triton_kernels


def version() -> str:
    """The version of triton, whose distribution has other names beside some builds of torch."""
    import triton

    return triton.__version__


@functools.cache
def capacity(device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plan:
    """How a problem is divided among programs; letters as in triton_kernels.py."""

    rows: int           # BM
    columns: int        # BN
    slices: int
    chunks: int
    ahead: int
    warps: int
    parts: int
    blocks: int
    groups: int
    resident: bool      # whether all programs fit on the GPU at once
    precision: str
    itemsize: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program: its columns of W, and h on its way in or the slices' sums."""
        chunk = self.slices * DEPTH
        staged, sums = self.ahead * chunk * self.rows, self.slices * self.rows * self.columns
        return self.itemsize * (self.chunks * chunk * self.columns + max(staged, sums))

    @property
    def constants(self) -> dict:
        return dict(PRECISION=self.precision, BM=self.rows, BN=self.columns, SLICES=self.slices, CHUNKS=self.chunks,
                    AHEAD=self.ahead)

    @property
    def options(self) -> dict:
        """num_stages=1 keeps loads behind the wait. Without maxnreg ptxas aims at two programs and spills registers."""
        return dict(num_warps=self.warps, num_stages=1, maxnreg=min(255, REGISTERS // (32 * self.warps)),
                    launch_cooperative_grid=self.waits)

    @property
    def waits(self) -> bool:
        return self.resident and self.parts > 1


@functools.lru_cache(maxsize=1024)
def make_plan(batch: int, hidden: int, dtype: torch.dtype, precision: str, programs: int, shared: int) -> Plan | None:
    """The plan for a batch on a GPU of so many multiprocessors with so many bytes of shared memory; None if none fits.

    A part gets as many columns as fit, so that few parts wait for each other. A row block gets the fewest rows with
    which every block still has its own group, because a step lasts as long as one program's share of it.
    """
    if batch * hidden >= 2**31:  # the kernels count inside a step in 32 bits
        return None
    plans = [_cut(batch, hidden, dtype, precision, programs, shared, columns) for columns in WIDTHS]
    plans = [plan for plan in plans if plan.shared <= shared]
    if hidden <= max(WIDTHS):  # one part where it fits
        plans = [plan for plan in plans if plan.parts == 1][-1:] or plans
    least = min((plan.parts * plan.columns for plan in plans), default=0)
    return next((plan for plan in plans if plan.parts * plan.columns <= TOLERATED * least), None)


def _cut(batch, hidden, dtype, precision, programs, shared, columns) -> Plan:
    tensor_cores = dtype is torch.float64 or precision == "tf32"
    parts = -(-hidden // columns)
    room = max(1, programs // parts)
    heights = [rows for rows in HEIGHTS if rows >= (16 if tensor_cores else 4)]
    rows = next((rows for rows in heights if -(-batch // rows) <= room), heights[-1])
    blocks = -(-batch // rows)
    if tensor_cores:  # a slice a warp
        slices = 8 if hidden > 4 * DEPTH else 4
        warps = slices
    else:             # 16 results a thread
        least = -(-hidden // DEPTH) * DEPTH
        slices = next(s for s in (8, 4, 2, 1) if s == 1 or (s * rows * columns <= 8192 and
                      -(-hidden // (s * DEPTH)) * s * DEPTH <= TOLERATED * least))
        warps = min(16, max(4, slices * rows * columns // 512))
    depth, itemsize = slices * DEPTH, dtype.itemsize
    chunks = -(-hidden // depth)
    left = shared - chunks * depth * columns * itemsize
    ahead = max(1, min(chunks, min(STAGED, left) // (depth * rows * itemsize)))
    resident = parts <= programs and (parts == 1 or not interpreted())
    return Plan(rows, columns, slices, chunks, ahead, warps, parts, blocks, min(blocks, room), resident, precision,
                itemsize)


# ── the recurrence ───────────────────────────────────────────────────────────────────────────────────────


def _launch(kernel, plan, length, *given, **named):
    """One launch for the sequence, or where not all programs can be on the GPU at once, one a step."""
    ranges = [(0, length)] if plan.resident else [(i, i + 1) for i in range(length)]
    with torch.cuda.device_of(given[0]):
        for first, last in ranges:
            kernel[(plan.parts, plan.groups)](*given, first=first, last=last, blocks=plan.blocks, groups=plan.groups,
                                              WAIT=plan.waits, **named, **plan.constants, **plan.options)


def _counters(plan, like):
    """Zeros for a launch: how many parts have arrived, for every row block."""
    return torch.zeros(plan.blocks * _kernels().COUNTER_STRIDE, dtype=torch.int32, device=like.device)


def _rows(tensor):
    """The tensor itself if its last dimension is contiguous and a step's rows lie within 2³¹ numbers, else a copy."""
    near = tensor.shape[-2] * tensor.stride(-2) < 2**31      # the kernels count inside a step in 32 bits
    return tensor if near and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1) else tensor.contiguous()


def _forward(plan, x, kernel, h0, numbers, bias, rule, phi, z, keep_h):
    """Fills z (T, B, H) if given; → h (T, B, H) if `keep_h`, else (2, B, H) with h_t at t % 2."""
    x, numbers = _rows(x), numbers.contiguous()
    steps, batch, hidden = x.shape
    h = x.new_empty(steps if keep_h else 2, batch, hidden)
    _launch(_kernels().forward, plan, steps, x, kernel.contiguous(), h0.contiguous(), numbers,
            numbers if bias is None else bias.contiguous(), h if z is None else z, h, _counters(plan, x),
            x_step=x.stride(0), x_row=x.stride(1), batch=batch, hidden=hidden,
            RULE=rule, PHI=phi, KEEP_Z=z is not None, KEEP_H=keep_h)
    return h


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, h0, numbers, bias, rule, phi, last_only, plan):
        z = torch.empty(x.shape, dtype=x.dtype, device=x.device)                             # (T, B, H)
        h = _forward(plan, x, kernel, h0, numbers, bias, rule, phi, z, keep_h=True)          # (T, B, H)
        ctx.rule, ctx.phi, ctx.last_only, ctx.plan = rule, phi, last_only, plan
        ctx.save_for_backward(kernel, h0, numbers, bias, z, h)
        return h[-1].clone() if last_only else h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kernel, h0, numbers, bias, z, h = ctx.saved_tensors
        need_x, need_kernel, need_h0, need_numbers, need_bias = ctx.needs_input_grad[:5]
        (steps, batch, hidden), plan = z.shape, ctx.plan
        grad, numbers, dz = _rows(grad), numbers.contiguous(), torch.empty_like(z)           # (T, B, H)
        number_parts = z.new_empty(steps, plan.blocks, plan.parts) if need_numbers else dz
        bias_parts = z.new_zeros(plan.groups, hidden) if need_bias else dz
        transposed = kernel.t().contiguous()                     # as quick to read as W is for the forward kernel
        _launch(_kernels().backward, plan, steps, grad, transposed, numbers,
                numbers if bias is None else bias.contiguous(), z, dz, number_parts, bias_parts, _counters(plan, z),
                grad_step=0 if ctx.last_only else grad.stride(0), grad_row=grad.stride(-2), steps=steps, batch=batch,
                hidden=hidden, RULE=ctx.rule, PHI=ctx.phi, LAST_ONLY=ctx.last_only, NEED_NUMBERS=need_numbers,
                NEED_BIAS=need_bias)

        d_kernel = d_h0 = None
        if need_kernel:
            d_kernel = torch.addmm(h0.t() @ dz[0], h[:-1].view(-1, hidden).t(), dz[1:].view(-1, hidden))
        if need_h0:
            d_h0 = dz[0] @ transposed
        d_numbers = number_parts.sum((1, 2), dtype=torch.float64).to(numbers.dtype) if need_numbers else None
        d_bias = bias_parts.sum(0, dtype=torch.float64).to(bias.dtype) if need_bias else None
        return dz if need_x else None, d_kernel, d_h0, d_numbers, d_bias, None, None, None, None
