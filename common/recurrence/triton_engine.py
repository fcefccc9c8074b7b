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
columns of W do not fit on chip (in float32 above H = 3584 on Hopper, 1536 with 99 KB of shared memory), or where triton
is missing, the PyTorch engine runs, and a line says so.

**The same bits.** No sum depends on an order that changes: no atomic addition to a float, partial sums are kept by
program and added up afterwards. Products are exact float32 unless `torch.set_float32_matmul_precision` asks for less,
which --tf32 does.

Memory, in arrays of T·B·H numbers, beside x and the gradient that comes in: forward h and z, backward h, z and δz;
without gradients h, or with last_only two states (B, H).
"""

import functools
import hashlib
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from common.recurrence.agreement import disagreement, problem, solve, verdict
from common.recurrence.native_build import say_once
from common.recurrence.torch_engine import sequence_recurrence

DTYPES = (torch.float32, torch.float64)
DEPTH = 16                          # triton_kernels.DEPTH, which cannot be imported without triton
WIDTHS = (128, 64, 32, 16)          # columns of W a part may own
HEIGHTS = (4, 8, 16, 32)            # rows of a row block
STAGED = 64 * 1024                  # bytes of h that are fetched at a time, where there is room
TOLERATED = 1.1                     # a plan may do so many times the least arithmetic, for a better shape
REGISTERS = 65536                   # of a multiprocessor
FOLDER = Path(__file__).parent
SOURCES = ("triton_engine.py", "triton_kernels.py", "agreement.py", "../stair.py")  # that a verdict depends on
PLANS_SECONDS = 40                  # of a test, after which no other plan is tried
HOPPER = (132, 227 * 1024)          # what the interpreter pretends to run on


def triton_recurrence(x, kernel, h0, numbers, rule, phi, bias, last_only, plan=None):
    """Arguments and result as in `common.recurrence.stair_recurrence`; numbers (T,). `plan`: another than the kept one.

    Raises ValueError for tensors that are not all float32 or all float64 on one GPU, and where triton is missing.
    """
    tensors = [t for t in (x, kernel, h0, numbers, bias) if t is not None]
    if (reason := unavailable_reason(x.device)) is not None:
        raise ValueError(reason)
    if x.dtype not in DTYPES or any((t.dtype, t.device) != (x.dtype, x.device) for t in tensors):
        found = ", ".join(sorted({f"{t.dtype} on {t.device}" for t in tensors}))
        raise ValueError(f"the triton engine needs float32 or float64 tensors, all alike, on one GPU; got {found}")
    _, batch, hidden = x.shape
    if batch and plan is None:
        plan = _kept_plan(batch, hidden, rule, phi, x.dtype, x.device, precision(x.dtype), capacity(x.device))
    if plan is None:
        if batch:
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
    if torch.version.hip is not None:
        return "the triton engine is made for NVIDIA's GPUs, and this torch is for AMD's; choose the engine auto there"
    if torch.device(device).type != "cuda" and not interpreted():
        return f"the triton engine needs a GPU, not the {torch.device(device).type}; choose the engine auto there"
    return None


def interpreted() -> bool:
    """Whether triton runs its kernels in Python, as its variable TRITON_INTERPRET asks it to, on the CPU too."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def precision(dtype) -> str:
    """How products are formed: exactly, or in float32 by tensor cores from 10 bits of mantissa."""
    return "ieee" if dtype is torch.float64 or torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def _kernels():
    from common.recurrence import triton_kernels

    return triton_kernels


@functools.cache
def capacity(device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


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
    def busiest(self) -> int:
        """Rows of a step that fall to the program with the most of them."""
        return -(-self.blocks // self.groups) * self.rows

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
def make_plans(batch: int, hidden: int, dtype: torch.dtype, precision: str, programs: int, shared: int) -> list[Plan]:
    """Plans for a batch on a GPU of so many multiprocessors with so many bytes of shared memory; [] if none fits.

    The first is what is best by counting. A part gets as many columns as fit, so that few parts wait for each other.
    A row block gets the most rows that leave the busiest program about its least number of rows, because a step lasts
    as long as that program's share of it. The others have row blocks of other heights, and may be faster.
    """
    if batch * hidden >= 2**31:  # the kernels count inside a step in 32 bits
        return []
    plans = [_cut(batch, hidden, dtype, precision, programs, shared, columns, rows)
             for columns in WIDTHS for rows in HEIGHTS
             if rows >= (16 if dtype is torch.float64 or precision == "tf32" else 4)]
    plans = [plan for plan in plans if plan.shared <= shared]
    if hidden <= max(WIDTHS):  # one part where it fits, and no wider than it needs
        least = min((plan.columns for plan in plans if plan.parts == 1), default=None)
        plans = [plan for plan in plans if plan.columns == least] or plans
    padded = min((plan.parts * plan.columns for plan in plans), default=0)
    plans = [plan for plan in plans if plan.parts * plan.columns <= TOLERATED * padded]
    plans = [plan for plan in plans if plan.columns == plans[0].columns]
    least = min((plan.busiest for plan in plans), default=0)
    return sorted((plan for plan in plans if plan.busiest <= 1.5 * least),
                  key=lambda plan: (plan.busiest > TOLERATED * least, -plan.rows))


def _cut(batch, hidden, dtype, precision, programs, shared, columns, rows) -> Plan:
    parts, blocks = -(-hidden // columns), -(-batch // rows)
    if dtype is torch.float64 or precision == "tf32":  # tensor cores: a slice a warp
        slices = 8 if hidden > 4 * DEPTH else 4
        warps = slices
    else:             # 16 results a thread; more than 8 slices only with 8 warps, whose registers can hold W
        least = -(-hidden // DEPTH) * DEPTH
        slices = next(s for s in (32, 16, 8, 4, 2) if s == 2 or (s * rows * columns <= (8192 if s <= 8 else 4096) and
                      -(-hidden // (s * DEPTH)) * s * DEPTH <= TOLERATED * least))
        warps = min(16, max(4, slices * rows * columns // 512))
    depth, itemsize = slices * DEPTH, dtype.itemsize
    chunks = -(-hidden // depth)
    left = shared - chunks * depth * columns * itemsize
    ahead = max(1, min(chunks, min(STAGED, left) // (depth * rows * itemsize)))
    resident = parts <= programs and (parts == 1 or not interpreted())
    return Plan(rows, columns, slices, chunks, ahead, warps, parts, blocks, min(blocks, max(1, programs // parts)),
                resident, precision, itemsize)


def _about(batch, hidden, rule, phi, dtype, device, precision) -> list:
    """All that a verdict depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    digest = hashlib.sha256(b"\0".join((FOLDER / source).read_bytes() for source in SOURCES)).hexdigest()
    return [batch, hidden, rule, phi, str(dtype), precision, name, *capacity(device), torch.__version__,
            _kernels().triton.__version__, digest]


@functools.cache
def is_right(batch, hidden, rule, phi, dtype, device, precision) -> bool:
    """Whether the kernels compute the right numbers for this case on this GPU; one line says so if not.

    The first time it is tested, in a process of its own: a launch that cannot end ends its process in a CUDA error.
    """
    if dtype not in DTYPES or not batch:
        return False
    path, reason = None, unavailable_reason(device)
    if reason is None and not make_plans(batch, hidden, dtype, precision, *capacity(device)):
        reason = f"it has no room for H = {hidden} in {dtype}"
    if reason is None:
        line = f"stair: testing the triton engine for B {batch}, H {hidden}: up to a minute, once on this GPU"
        try:
            about = _about(batch, hidden, rule, phi, dtype, device, precision)
            found, path = verdict("triton", about, line, __name__, "trial", batch, hidden, rule, phi, str(dtype),
                                  str(device), precision)
            reason = found.get("reason", found.get("untested"))
        except ImportError as error:
            reason = f"it cannot be imported ({error})"
    if reason is not None:
        again = f"; delete {path} to test it again" if path else ""
        say_once(f"stair: running the PyTorch engine; triton: {reason}{again}")
    return reason is None


def trial(batch, hidden, rule, phi, dtype, device, precision) -> dict:
    """{"reason": what is wrong with the kernels or None, "plan": place of the fastest}, or {"untested": why}."""
    dtype, device = getattr(torch, dtype.removeprefix("torch.")), torch.device(device)
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:  # a GPU in exclusive mode
        said = str(error).splitlines()[0]
        return {"untested": f"it could not be tested, because this GPU takes no second process ({said})"}
    began, times = time.monotonic(), {}
    try:
        for place, plan in enumerate(make_plans(batch, hidden, dtype, precision, *capacity(device))):
            engine = functools.partial(triton_recurrence, plan=plan)
            wrong = disagreement(engine, batch, hidden, rule, phi, dtype, precision, device,
                                 repetitions=1 if interpreted() else 20)
            if place == 0 and (wrong is not None or interpreted()):
                return {"reason": wrong, "plan": 0}
            if wrong is None:
                given = problem(150, batch, hidden, rule, phi, dtype, device)
                times[place] = min(_seconds(engine, given, rule, phi) for _ in range(50))
            if time.monotonic() - began > PLANS_SECONDS:
                break
    except torch.OutOfMemoryError:
        return {"untested": "there is no memory left to test it beside this run"}
    return {"reason": None, "plan": min(times, key=times.get)}


def _seconds(engine, given, rule, phi) -> float:
    """What forward and backward of a problem take on a GPU."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    solve(engine, given, rule, phi, False)
    torch.cuda.synchronize()
    return time.perf_counter() - began


@functools.cache
def _kept_plan(batch, hidden, rule, phi, dtype, device, precision, capacity) -> Plan | None:
    """The plan that was the fastest in the test of this case; without a test the first one."""
    plans, place = make_plans(batch, hidden, dtype, precision, *capacity), 0
    if len(plans) > 1 and not interpreted():
        found, _ = verdict("triton", _about(batch, hidden, rule, phi, dtype, device, precision))
        place = found.get("plan", 0)
    return plans[place] if plans else None


def _launch(kernel, plan, length, *given, **named):
    """One launch for the sequence, or where not all programs can be on the GPU at once, one a step."""
    ranges = [(0, length)] if plan.resident else [(i, i + 1) for i in range(length)]
    with torch.cuda.device_of(given[0]):
        for first, last in ranges:
            kernel[(plan.parts, plan.groups)](*given, first=first, last=last, blocks=plan.blocks, groups=plan.groups,
                                              WAIT=plan.waits, **named, **plan.constants, **plan.options)


def arrivals(plan, device):
    """Zeros for a launch: how many parts have arrived, for every row block."""
    return torch.zeros(plan.blocks * _kernels().COUNTER_STRIDE, dtype=torch.int32, device=device)


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
            numbers if bias is None else bias.contiguous(), h if z is None else z, h, arrivals(plan, x.device),
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
                numbers if bias is None else bias.contiguous(), z, dz, number_parts, bias_parts,
                arrivals(plan, z.device), grad_step=0 if ctx.last_only else grad.stride(0), grad_row=grad.stride(-2),
                steps=steps, batch=batch, hidden=hidden, RULE=ctx.rule, PHI=ctx.phi, LAST_ONLY=ctx.last_only,
                NEED_NUMBERS=need_numbers, NEED_BIAS=need_bias)

        d_kernel = d_h0 = None
        if need_kernel:
            d_kernel = torch.addmm(h0.t() @ dz[0], h[:-1].view(-1, hidden).t(), dz[1:].view(-1, hidden))
        if need_h0:
            d_h0 = dz[0] @ transposed
        d_numbers = number_parts.sum((1, 2), dtype=torch.float64).to(numbers.dtype) if need_numbers else None
        d_bias = bias_parts.sum(0, dtype=torch.float64).to(bias.dtype) if need_bias else None
        return dz if need_x else None, d_kernel, d_h0, d_numbers, d_bias, None, None, None, None
