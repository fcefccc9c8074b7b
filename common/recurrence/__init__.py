"""Time: h_t = g_t(x_t + h_{t-1} W) · φ(x_t + h_{t-1} W), t = 0 … T−1, by one of several engines.

    reference   a plain loop under autograd: slow and obviously right, the yardstick of every test
    torch       the whole sequence as one autograd.Function in pure PyTorch; any device, any dtype
    native      the same in one call of compiled code; float32 and float64 on the CPU
    triton      the same in one launch on a GPU; float32 and float64

`auto` is native on a CPU where a compiler is found; triton on a GPU where it has passed its test for these sizes,
`python -m common.recurrence.verify`; else torch. `stair_recurrence` is the only function that callers need.
"""

import torch

from common.recurrence import native_engine, triton_engine, verdicts
from common.recurrence.reference_engine import reference_recurrence
from common.recurrence.torch_engine import sequence_recurrence

ENGINES = {"reference": reference_recurrence, "torch": sequence_recurrence, "native": native_engine.native_recurrence,
           "triton": triton_engine.triton_recurrence}


def unavailable_reason(engine: str, device) -> str | None:
    """Why `engine` cannot run on `device`, in a sentence; None if it can. The native engine is built to know it."""
    module = {"native": native_engine, "triton": triton_engine}.get(engine)
    return None if module is None else module.unavailable_reason(device)


def automatic(x: torch.Tensor, rule: str, phi: str) -> str:
    """The engine that `auto` stands for on the device and the sizes of x (T, B, H)."""
    if native_engine.serves(x):
        return "native"
    if x.device.type == "cuda" and x.dtype in triton_engine.DTYPES \
            and verdicts.is_trusted(verdicts.Case.of(x, rule, phi), x.device):
        return "triton"
    return "torch"


def stair_recurrence(x, kernel, h0, stair, nonlinearity, engine="auto", last_only=False) -> torch.Tensor:
    """Run the recurrence over a whole sequence.

    x             (T, B, H)  projected input, x_t U (+ bias)
    kernel        (H, H)     W; rows are examples: z_t = x_t + h_{t-1} W
    h0            (B, H)     hidden state before the first step
    stair         `common.stair.Stair`: the numbers ρ_t or α_t and their rule
    nonlinearity  `common.stair.Nonlinearity`: φ, with modReLU's bias
    engine        "auto", or a name from `ENGINES`
    last_only     return only the last state, (B, H): the gradient of the others is then never stored

    → h (T, B, H), or (B, H) with `last_only`. Differentiable in x, kernel, h0, the stair's numbers and
    modReLU's bias. Raises ValueError for shapes that do not fit and for an unknown engine.
    """
    steps, batch, hidden = x.shape
    if steps == 0:
        raise ValueError("the sequence is empty; it needs at least one step")
    if kernel.shape != (hidden, hidden) or h0.shape != (batch, hidden):
        raise ValueError(f"x {tuple(x.shape)} needs a kernel {(hidden, hidden)} and h0 {(batch, hidden)}; "
                         f"got {tuple(kernel.shape)} and {tuple(h0.shape)}")
    if engine == "auto":
        engine = automatic(x, stair.rule, nonlinearity.name)
    if engine not in ENGINES:
        raise ValueError(f"there is no engine '{engine}'; choose auto, {', '.join(ENGINES)}")
    numbers = stair(steps).to(x.dtype)
    return ENGINES[engine](x, kernel, h0, numbers, stair.rule, nonlinearity.name, nonlinearity.bias, last_only)
