"""Time: h_t = g_t(x_t + h_{t-1} W) · φ(x_t + h_{t-1} W), t = 0 … T−1, by one of several engines.

    reference   a plain loop under autograd: slow and obviously right, the yardstick of every test
    torch       the whole sequence as one autograd.Function in pure PyTorch; any device, any dtype
    native      the same in one call of compiled code; float32 and float64 on the CPU
    triton      the same in one launch on a GPU; float32 and float64

`auto` is native on a CPU where a compiler is found; triton on a GPU where its numbers for these sizes are right; else
torch. Where an engine cannot compute a stair or φ of one's own, `auto` takes the next slower one, and a line says why.
"""

import contextlib
import functools

import torch

from common.recurrence import native_engine, triton_engine
from common.recurrence.native_build import say_once
from common.recurrence.native_engine import COMPILED_NONLINEARITIES, COMPILED_RULES
from common.recurrence.reference_engine import reference_recurrence
from common.recurrence.torch_engine import is_elementwise, sequence_recurrence
from common.stair import RULES, Nonlinearity

ENGINES = {"reference": reference_recurrence, "torch": sequence_recurrence, "native": native_engine.native_recurrence,
           "triton": triton_engine.triton_recurrence}


def unavailable_reason(engine: str, device) -> str | None:
    """Why `engine` cannot run on `device`, in a sentence; None if it can. May build the native engine."""
    module = {"native": native_engine, "triton": triton_engine}.get(engine)
    return None if module is None else module.unavailable_reason(device)


def _formula(nonlinearity) -> tuple:
    """φ as the engines take it, a name or a function of one's own, and modReLU's bias."""
    return (nonlinearity.name, nonlinearity.bias) if type(nonlinearity) is Nonlinearity else (nonlinearity, None)


def unfit_reason(engine: str, hidden: int, stair, nonlinearity) -> str | None:
    """Why `engine` cannot compute this stair and φ for H units, in a sentence; None if it can. "auto": why none can."""
    numbers, rule, phi, name = stair.forward(1), stair.rule, _formula(nonlinearity)[0], type(stair).__name__
    if numbers.shape not in ((1,), (1, hidden)):
        return f"{name} gives numbers of shape {tuple(numbers.shape)} for one step of {hidden} units; give (1,), or " \
               f"(1, {hidden}) with a number for every unit"
    if not callable(rule) and rule not in RULES:
        return f"{name} has the rule '{rule}', which does not exist; choose {', '.join(RULES)} or write a method"
    compiled, what = engine in ("native", "triton"), None
    if compiled and numbers.ndim > 1:
        what = f"takes one number a step, and {name} has one for every unit"
    elif compiled and rule not in COMPILED_RULES:
        what = f"computes the rules {', '.join(COMPILED_RULES)}, and {name} has another"
    elif compiled and phi not in COMPILED_NONLINEARITIES:
        what = f"computes the nonlinearities {', '.join(COMPILED_NONLINEARITIES)}, and this network has another"
    elif engine == "torch" and (callable(rule) or callable(phi)) and not _is_elementwise(
            stair, rule, nonlinearity, getattr(nonlinearity, "training", None), numbers.dtype, numbers.device, hidden):
        what = "needs a rule and a nonlinearity that are elementwise, not random and without parameters of their own"
    return what and f"the {engine} engine {what}; choose the engine auto or reference"


@functools.lru_cache(maxsize=16)
def _is_elementwise(stair, rule, nonlinearity, training, dtype, device, hidden) -> bool:
    """Asked once, not in every step: it reads numbers, for which the host would wait for a GPU."""
    return is_elementwise(rule, _formula(nonlinearity)[0], stair.forward(1)[0], _formula(nonlinearity)[1], hidden)


def engine_for(x: torch.Tensor, stair, nonlinearity, engine: str = "auto") -> str:
    """The engine that computes this stair and φ for x (T, B, H): `engine`, or what "auto" stands for.

    Raises ValueError for an engine that cannot.
    """
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"there is no engine '{engine}'; choose auto, {', '.join(ENGINES)}")
    hidden, on_gpu = x.shape[2], x.device.type == "cuda"
    fastest = engine if engine != "auto" else "triton" if on_gpu else "native"
    reason = unfit_reason(fastest, hidden, stair, nonlinearity)
    if engine != "auto":
        if reason is not None:
            raise ValueError(reason)
        return engine
    if reason is None:
        if on_gpu:
            is_right = triton_engine.is_right(*x.shape[1:], stair.rule, nonlinearity.name, x.dtype, x.device,
                                              triton_engine.precision(x.dtype))
        else:
            is_right = native_engine.serves(x)
        return fastest if is_right else "torch"
    if (invalid := unfit_reason("auto", hidden, stair, nonlinearity)) is not None:
        raise ValueError(invalid)
    slower = unfit_reason("torch", hidden, stair, nonlinearity)
    engine, reason = ("torch", reason) if slower is None else ("reference", slower)
    say_once(f"stair: running the {engine} engine; {reason.partition(';')[0]}")
    return engine


def without_autocast(device):
    """A context in which products keep the dtype of their factors; it changes nothing where autocast is off."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


def run_recurrence(engine: str, x, kernel, h0, stair, nonlinearity, last_only=False) -> torch.Tensor:
    """As `stair_recurrence`, with an engine that `engine_for` has found. x goes to the dtype of W."""
    steps, batch, hidden = x.shape
    if steps == 0:
        raise ValueError("the sequence is empty; it needs at least one step")
    if kernel.shape != (hidden, hidden) or h0.shape != (batch, hidden):
        raise ValueError(f"x {tuple(x.shape)} needs a kernel {(hidden, hidden)} and h0 {(batch, hidden)}; "
                         f"got {tuple(kernel.shape)} and {tuple(h0.shape)}")
    numbers, (phi, bias) = stair(steps).to(kernel.dtype), _formula(nonlinearity)
    with without_autocast(x.device):
        return ENGINES[engine](x.to(kernel.dtype), kernel, h0, numbers, stair.rule, phi, bias, last_only)


def stair_recurrence(x, kernel, h0, stair, nonlinearity, engine="auto", last_only=False) -> torch.Tensor:
    """Run the recurrence over a whole sequence.

    x             (T, B, H)  projected input, x_t U (+ bias)
    kernel        (H, H)     W; rows are examples: z_t = x_t + h_{t-1} W
    h0            (B, H)     hidden state before the first step
    stair         `common.stair.Stair`: the numbers ρ_t or α_t and their rule
    nonlinearity  `common.stair.Nonlinearity`: φ, with modReLU's bias; or a function of z
    engine        "auto", or a name from `ENGINES`
    last_only     return only the last state, (B, H): the gradient of the others is then never stored

    → h (T, B, H), or (B, H) with `last_only`. Differentiable in x, kernel, h0, the stair's numbers and
    modReLU's bias. Raises ValueError for shapes that do not fit and for an engine that cannot compute this stair or φ.
    """
    engine = engine_for(x, stair, nonlinearity, engine)
    return run_recurrence(engine, x, kernel, h0, stair, nonlinearity, last_only)
