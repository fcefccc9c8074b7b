"""The kernels of the triton engine: forward and backward over a range of time steps. Needs triton to be imported.

triton_engine.py, the only caller, explains how the work is shared and why a launch cannot hang.

    grid    (parts, groups)
    part    BN columns of W, which stay on chip for the whole range of steps
    group   takes the row blocks group, group + groups, … of BM batch rows each

**The product.** acc (SLICES, BM, BN) = Σ_chunks h (SLICES, BM, DEPTH) · W (SLICES, DEPTH, BN), summed over SLICES at
the end of a step. The product is batched, so every warp has its own slice of the sum over k, and a thread has a tile of
4 × 4 results. A plain BM × BN product would give a thread one or two results, and in exact float32 shared memory would
limit the step instead of multiply-adds. H is covered by chunks of SLICES · DEPTH, not by a power of two.

**Memory order.** h_{t-1} is written by all parts of a group and read by all of them one step later:

    writer   every thread: st h_t      bar.sync      thread 0: red.release.gpu arrived[block] += 1
    reader   thread 0: ld.acquire.gpu arrived[block] until it is parts · t      bar.sync      every thread: ld h_{t-1}

In the PTX memory model the first bar.sync puts the program's stores before thread 0's release, a chain of atomic
additions passes every release in it on to the acquire that reads the last of them, and the second bar.sync puts the
acquire before the program's loads; the causality order is transitive, so every load sees every store. It is the
pattern of a grid-wide barrier, for a part of the grid. No compiler may move anything across: loads, stores and the
two blocks of inline assembly are marked as having side effects, barriers order memory too, and num_stages=1 keeps
Triton from fetching the loads of a later step ahead. A test checks this order in the PTX. The loads are .cg: they pass
by the first-level cache, which may hold old values.

**Ahead of time.** What a step reads beside h_{t-1} is fetched at the end of the step before, while others still work.
The loads stand after the product for a second reason: Triton then gives the arithmetic that follows the layout of the
loads, one or two results a thread. In the layout of the product all warps would compute the same results.

**Overwriting.** With KEEP_H false, h has two slots and h_t overwrites h_{t-2}. A part writes h_t only after all parts
have arrived at t-1, and a part arrives at t-1 only after it has read h_{t-2}.
"""

import triton
import triton.language as tl

DEPTH = 16              # of a slice of a chunk: the least that tl.dot takes
COUNTER_STRIDE = 32     # int32 between the counters of two row blocks: a cache line each
SPIN_LIMIT = 1 << 24    # polls: some seconds, where a wait is a step

_DEPTH = tl.constexpr(DEPTH)
_COUNTER_STRIDE = tl.constexpr(COUNTER_STRIDE)

# Thread 0 polls; beyond the limit it traps, and the launch ends in a CUDA error instead of waiting for ever. Its warp
# comes together again before the barrier that follows.
_WAIT = tl.constexpr(f"""{{
    .reg .pred other, done, more;
    .reg .u32 thread, count, polls;
    mov.u32 thread, %tid.x;
    setp.ne.u32 other, thread, 0;
    mov.u32 polls, 0;
    @other bra DONE;
POLL:
    ld.acquire.gpu.global.u32 count, [$1];
    setp.ge.s32 done, count, $2;
    @done bra DONE;
    add.u32 polls, polls, 1;
    setp.lt.u32 more, polls, {SPIN_LIMIT};
    @more bra POLL;
    trap;
DONE:
    bar.warp.sync 0xffffffff;
    mov.u32 $0, polls;
}}""")
_ARRIVE = tl.constexpr("""{
    .reg .pred first;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first red.release.gpu.global.add.u32 [$1], 1;
    mov.u32 $0, 0;
}""")


@triton.jit
def _wait(counter, target):
    """Wait until `target` parts have arrived. The whole block can then read what these parts have written."""
    tl.inline_asm_elementwise(_WAIT, "=r,l,r", [counter.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _arrive(counter):
    """Announce that this block has written its part: those that wait for it can then read it."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(_ARRIVE, "=r,l", [counter.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _expm1(u):
    """e^u − 1 without the cancellation near 0: a Taylor polynomial up to |u| = ½, of 9 terms or, in float64, 15."""
    series = tl.zeros_like(u) + 1
    if u.dtype == tl.float64:
        for n in tl.static_range(15, 1, -1):
            series = 1 + u * series / n
    else:
        for n in tl.static_range(9, 1, -1):
            series = 1 + u * series / n
    return tl.where(tl.abs(u) < 0.5, u * series, tl.exp(u) - 1)


@triton.jit
def _sign(z):
    return tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0)).to(z.dtype)


@triton.jit
def _positive(z):
    """max(z, 0), but NaN where z is, of which tl.maximum makes 0: a run that blows up has to show it."""
    return tl.where(z < 0, 0.0, z).to(z.dtype)


@triton.jit
def _phi(z, bias, PHI: tl.constexpr):
    """φ(z) and φ'(z)."""
    if PHI == "modrelu":
        size = tl.abs(z) + bias
        value, slope = _sign(z) * _positive(size), tl.where((size > 0) & (z != 0), 1.0, 0.0).to(z.dtype)
    elif PHI == "relu":
        value, slope = _positive(z), tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    elif PHI == "tanh":
        e = _expm1(-2 * tl.abs(z))
        value = -_sign(z) * e / (e + 2)
        slope = 1 - value * value
    elif PHI == "sigmoid":
        value = 1 / (1 + tl.exp(-z))
        slope = value * (1 - value)
    else:
        value, slope = z, tl.zeros_like(z) + 1
    return value, slope


@triton.jit
def _stair(z, number, RULE: tl.constexpr):
    """g(z), ∂g/∂z and ∂g/∂number."""
    if RULE == "exponential":
        size = tl.abs(z)
        factor, rest = -_expm1(-number * size), tl.exp(-number * size)
        along_z, along_number = number * rest * _sign(z), size * rest
    elif RULE == "literal":
        factor, rest = -_expm1(-number * z), tl.exp(-number * z)
        along_z, along_number = number * rest, z * rest
    else:
        factor = tl.zeros_like(z) + number
        along_z, along_number = tl.zeros_like(z), tl.zeros_like(z) + 1
    return factor, along_z, along_number


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """x in 10 bits of mantissa, the nearest, where the product is tf32.

    A tensor core cuts the other 13 bits off, always towards 0: a rotation would lose 7e-4 of a state's norm a step, 42
    per cent of it in 784.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)       # a NaN of all ones would become 0
    return x


@triton.jit
def _columns(kernel, part, hidden, BN: tl.constexpr, SLICES: tl.constexpr, CHUNKS: tl.constexpr,
             PRECISION: tl.constexpr):
    """BN columns of the contiguous kernel (H, H), a tuple of chunks (SLICES, DEPTH, BN)."""
    k = (tl.arange(0, SLICES)[:, None] * _DEPTH + tl.arange(0, _DEPTH)[None, :])[:, :, None]
    n = (part * BN + tl.arange(0, BN))[None, None, :]
    chunks = ()
    for c in tl.static_range(CHUNKS):
        row = k + c * SLICES * _DEPTH
        chunk = tl.load(kernel + row * hidden + n, mask=(row < hidden) & (n < hidden), other=0.0)
        chunks = chunks + (_rounded(chunk, PRECISION),)  # noqa: RUF005 (Triton has no unpacking)
    return chunks


@triton.jit
def _product(rows, columns, block, batch, hidden, BM: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr,
             CHUNKS: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of the contiguous matrix `rows` (B, H) times `columns` → (BM, BN). AHEAD chunks are fetched at a time."""
    dtype: tl.constexpr = rows.dtype.element_ty
    m = (block * BM + tl.arange(0, BM))[None, :, None]
    k = (tl.arange(0, SLICES)[:, None] * _DEPTH + tl.arange(0, _DEPTH)[None, :])[:, None, :]
    acc = tl.zeros((SLICES, BM, BN), dtype=dtype)
    for start in tl.static_range(0, CHUNKS, AHEAD):
        fetched = ()
        for c in tl.static_range(start, start + AHEAD):
            if c < CHUNKS:
                column = k + c * SLICES * _DEPTH
                chunk = tl.load(rows + m * hidden + column, mask=(m < batch) & (column < hidden), other=0.0,
                                cache_modifier=".cg")
                fetched = fetched + (chunk,)  # noqa: RUF005
        for c in tl.static_range(start, start + AHEAD):
            if c < CHUNKS:
                rounded = _rounded(fetched[c - start], PRECISION)
                acc = tl.dot(rounded, columns[c], acc, input_precision=PRECISION, out_dtype=dtype)
    # Over the slices. The split moves them into few warps; tl.sum alone would exchange them through shared memory with
    # every thread of a warp at the same bank: 8000 cycles, of 10000 in a step of the copying task on an H200.
    one, other = tl.split(tl.reshape(tl.permute(acc, (1, 2, 0)), (BM * BN, SLICES // 2, 2)))
    return tl.reshape(tl.sum(one + other, 1), (BM, BN))


@triton.jit
def _next(step, block, group, groups, blocks):
    """The next row block of a group, or its first one of the next step."""
    last = block + groups >= blocks
    return tl.where(last, step + 1, step), tl.where(last, group, block + groups)


VARYING = ["first", "last", "steps", "batch", "blocks", "groups"]  # numbers that need no kernel of their own


@triton.jit
def _tile(matrix, start, row, block, n, batch, hidden, wanted, BM: tl.constexpr):
    """Rows of a block and columns n of the matrix at matrix + start, zeros unless `wanted`."""
    m = (block * BM + tl.arange(0, BM))[:, None]
    return tl.load(matrix + start + m * row + n, mask=(m < batch) & (n < tl.where(wanted, hidden, 0)), other=0.0)


@triton.jit
def _gradient(grad, grad_step, grad_row, i, steps, block, n, batch, hidden, wanted, LAST_ONLY: tl.constexpr,
              BM: tl.constexpr):
    """The tile of ∂L/∂h_t, t = T−1−i."""
    if LAST_ONLY:
        tile = _tile(grad, 0, grad_row, block, n, batch, hidden, wanted & (i == 0), BM)
    else:
        start = (steps - 1 - i) * tl.cast(grad_step, tl.int64)
        tile = _tile(grad, start, grad_row, block, n, batch, hidden, wanted, BM)
    return tile


@triton.jit(do_not_specialize=VARYING)
def forward(x, kernel, h0, numbers, bias, z, h, arrived, x_step, x_row, first, last, batch, hidden, blocks, groups,
            RULE: tl.constexpr, PHI: tl.constexpr, KEEP_Z: tl.constexpr, KEEP_H: tl.constexpr, WAIT: tl.constexpr,
            PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr, CHUNKS: tl.constexpr,
            AHEAD: tl.constexpr):
    """Steps first … last − 1: z_t = x_t + h_{t-1} W, h_t = g_t(z_t) φ(z_t).

    x (T, B, H) with strides (x_step, x_row, 1); h0 (B, H); numbers (T,); bias (H,); z (T, B, H) if KEEP_Z;
    h (T, B, H) if KEEP_H, else (2, B, H) of which t % 2 holds h_t; arrived: a counter a row block, 0 at the start.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    columns = _columns(kernel, part, hidden, BN, SLICES, CHUNKS, PRECISION)
    n = (part * BN + tl.arange(0, BN))[None, :]
    b = tl.load(bias + n, mask=n < hidden, other=0.0) if PHI == "modrelu" else 0.0
    size = batch.to(tl.int64) * hidden
    group = tl.program_id(1)
    mine = (blocks - group + groups - 1) // groups
    t, block = first, group
    next_x = _tile(x, first * tl.cast(x_step, tl.int64), x_row, group, n, batch, hidden, True, BM)
    for _ in range(0, (last - first) * mine):
        number = tl.load(numbers + t)
        x_t = next_x
        before, now = (t - 1, t) if KEEP_H else ((t + 1) % 2, t % 2)
        previous = h + before * size
        if t == 0:
            previous = h0
        if WAIT:
            _wait(arrived + block * _COUNTER_STRIDE, parts * t)
        z_t = x_t + _product(previous, columns, block, batch, hidden, BM, BN, SLICES, CHUNKS, AHEAD, PRECISION)
        factor, _, _ = _stair(z_t, number, RULE)
        value, _ = _phi(z_t, b, PHI)
        m = (block * BM + tl.arange(0, BM))[:, None]
        inside = (m < batch) & (n < hidden)
        tl.store(h + now * size + m * hidden + n, factor * value, mask=inside)
        if WAIT:
            _arrive(arrived + block * _COUNTER_STRIDE)
        else:
            tl.debug_barrier()  # the only part reads at the next step what its other threads have written
        # No other program waits for what follows.
        if KEEP_Z:
            tl.store(z + t * size + m * hidden + n, z_t, mask=inside)
        t, block = _next(t, block, group, groups, blocks)
        next_x = _tile(x, t * tl.cast(x_step, tl.int64), x_row, block, n, batch, hidden, t < last, BM)


@triton.jit(do_not_specialize=VARYING)
def backward(grad, transposed, numbers, bias, z, dz, number_parts, bias_parts, arrived, grad_step, grad_row,
             first, last, steps, batch, hidden, blocks, groups,
             RULE: tl.constexpr, PHI: tl.constexpr, LAST_ONLY: tl.constexpr, NEED_NUMBERS: tl.constexpr,
             NEED_BIAS: tl.constexpr, WAIT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             SLICES: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr):
    """Steps i = first … last − 1 of t = T−1−i: δh_t = ∂L/∂h_t + δz_{t+1} Wᵀ, δz_t = δh_t ∂h_t/∂z_t.

    grad (T, B, H) with strides (grad_step, grad_row, 1), or (B, H) with LAST_ONLY; transposed: Wᵀ (H, H);
    z and dz (T, B, H). Sums that no atomic addition touches, so that their order never changes:
    number_parts (T, blocks, parts) and bias_parts (groups, H), the latter added to.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    columns = _columns(transposed, part, hidden, BN, SLICES, CHUNKS, PRECISION)
    n = (part * BN + tl.arange(0, BN))[None, :]
    b = tl.load(bias + n, mask=n < hidden, other=0.0) if PHI == "modrelu" else 0.0
    size = batch.to(tl.int64) * hidden
    group = tl.program_id(1)
    mine = (blocks - group + groups - 1) // groups
    i, block = first, group
    d_bias = tl.zeros((BM, BN), dtype=z.dtype.element_ty)
    next_z = _tile(z, (steps - 1 - first) * size, hidden, group, n, batch, hidden, True, BM)
    next_grad = _gradient(grad, grad_step, grad_row, first, steps, group, n, batch, hidden, True, LAST_ONLY, BM)
    for _ in range(0, (last - first) * mine):
        t = steps - 1 - i
        number = tl.load(numbers + t)
        z_t, grad_t = next_z, next_grad
        later = dz + tl.minimum(t + 1, steps - 1) * size
        rows = tl.where(i > 0, batch, 0)  # nothing comes back from beyond the last step
        if WAIT:
            _wait(arrived + block * _COUNTER_STRIDE, parts * i)
        dh = grad_t + _product(later, columns, block, rows, hidden, BM, BN, SLICES, CHUNKS, AHEAD, PRECISION)
        factor, along_z, along_number = _stair(z_t, number, RULE)
        value, slope = _phi(z_t, b, PHI)
        m = (block * BM + tl.arange(0, BM))[:, None]
        inside = (m < batch) & (n < hidden)
        tl.store(dz + t * size + m * hidden + n, dh * (along_z * value + factor * slope), mask=inside)
        if WAIT:
            _arrive(arrived + block * _COUNTER_STRIDE)
        else:
            tl.debug_barrier()
        if NEED_NUMBERS:
            place = number_parts + (t * tl.cast(blocks, tl.int64) + block) * parts + part
            tl.store(place, tl.sum(dh * along_number * value))
        if NEED_BIAS:  # ∂φ/∂b = sign(z) where modReLU is open
            d_bias += dh * factor * _sign(z_t) * slope
        i, block = _next(i, block, group, groups, blocks)
        next_z = _tile(z, (steps - 1 - i) * size, hidden, block, n, batch, hidden, i < last, BM)
        next_grad = _gradient(grad, grad_step, grad_row, i, steps, block, n, batch, hidden, i < last, LAST_ONLY, BM)
    if NEED_BIAS:
        column = part * BN + tl.arange(0, BN)
        place = bias_parts + group * hidden + column
        before = tl.load(place, mask=column < hidden, other=0.0)
        tl.store(place, before + tl.sum(d_bias, 0), mask=column < hidden)
