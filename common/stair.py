"""The stair: one number per time step, and the rule by which it scales the nonlinearity.

    h_t = g_t(z_t) · φ(z_t)

    nvar       g_t(z) = ρ_t                    a fixed schedule             FixedStair
    alpha      g_t(z) = α_t                    one learned number a step    LearnedStair
    expalpha   g_t(z) = 1 − exp(−α_t |z|)      the same, α_t ≥ 0            ExponentialStair

t counts from 0 at the start of every sequence. φ is one of `NONLINEARITIES`; modReLU is the default of
the papers (Arjovsky et al. 2016, eq. 8; Helfrich et al. 2018):

    φ(z) = sign(z) · max(|z| + b, 0)           b ∈ R^H learned, b ~ U(−0.01, 0.01)

The formulas stand here once. The reference and the PyTorch engine of `common.recurrence` call
`stair_activation`; the compiled engines write it again and are tested against it.
"""

import torch
from torch import nn

SCHEDULES = {
    "none": lambda t: torch.ones_like(t),
    "n": lambda t: 1 - 1 / (t + 2),
    "n2": lambda t: 1 - 1 / (t + 2) ** 2,
    "expn": lambda t: 1 - torch.exp(-(t + 2)),
    "logn": lambda t: 1 - 1 / torch.log(t + 2),  # −0.4427 at t = 0: the paper keeps the sign
    "log2n": lambda t: 1 - 1 / torch.log(2 * (t + 4)),
    "sqrtlogn": lambda t: 1 - 1 / torch.sqrt(torch.log(t + 3)),
}
SCHEDULE_ALIASES = {"1n": "n", "n^2": "n2", "1n2": "n2"}

RULES = {  # g_t(z) of the number of a step and z
    "scale": lambda step, z: step,
    "exponential": lambda step, z: _OneMinusExp.apply(step * z.abs()),
    "literal": lambda step, z: _OneMinusExp.apply(step * z),  # the authors' code: unbounded where z < 0
}
NONLINEARITIES = {  # φ(z) of z and modReLU's b
    "none": lambda z, b: z,
    "tanh": lambda z, b: torch.tanh(z),
    "relu": lambda z, b: torch.relu(z),
    "modrelu": lambda z, b: torch.sign(z) * torch.relu(z.abs() + b),
    "sigmoid": lambda z, b: torch.sigmoid(z),
}


def schedule(name: str, steps: int) -> torch.Tensor:
    """ρ_0 … ρ_{steps−1} of the schedule `name` → (steps,) float64. Raises ValueError for an unknown name."""
    name = SCHEDULE_ALIASES.get(name, name)
    if name not in SCHEDULES:
        raise ValueError(f"there is no schedule '{name}'; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](torch.arange(steps, dtype=torch.float64))


def stair_factor(rule, step: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """g_t(z) for the numbers `step`, which broadcast against z; `rule` is a name of `RULES` or a function (step, z)."""
    return (rule if callable(rule) else RULES[rule])(step, z)


class _OneMinusExp(torch.autograd.Function):
    """1 − e^{−u} with its derivative e^{−u}, of which autograd would lose the digits: it forms expm1(−u) + 1."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return -torch.expm1(-u)

    @staticmethod
    def backward(ctx, grad):
        u, = ctx.saved_tensors
        return grad * torch.exp(-u)


def nonlinearity(phi, z: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """φ(z), elementwise; `phi` is one of `NONLINEARITIES` or a function of z, `bias` (H,) is modReLU's b."""
    return phi(z) if callable(phi) else NONLINEARITIES[phi](z, bias)


def stair_activation(z, step, rule, phi, bias):
    """g(z) · φ(z): all that happens between the matrix product and the next hidden state."""
    return stair_factor(rule, step, z) * nonlinearity(phi, z, bias)


class Nonlinearity(nn.Module):
    """φ with its own parameter: b (H,) for modReLU, none for the others."""

    def __init__(self, name: str, hidden_size: int):
        super().__init__()
        if name not in NONLINEARITIES:
            raise ValueError(f"there is no nonlinearity '{name}'; choose one of {', '.join(NONLINEARITIES)}")
        self.name = name
        self.bias = nn.Parameter(torch.empty(hidden_size).uniform_(-0.01, 0.01)) if name == "modrelu" else None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return nonlinearity(self.name, z, self.bias)


class Stair(nn.Module):
    """Common to all stairs: `numbers` of shape (T,), or (T, H) with a number for every unit. T: the longest sequence.

    rule      how a number scales φ: one of `RULES`, or a method `rule(step, z)` → g_t(z)
    minimum   the optimizer keeps the numbers at or above this (None: no bound)

    Numbers that are an nn.Parameter are learned. A new stair may have a rule of its own, here g_t(z) = exp(−α_t z²):

        class Gaussian(LearnedStair):
            def rule(self, step, z):
                return torch.exp(-step * z**2)

    A rule is elementwise: `step`, the numbers of one step or of several, broadcasts against z. An elementwise function
    of z can also take the place of the name of φ, as in build_network(..., nonlin=torch.sin, ...). `--engine auto`
    takes the fastest engine that can compute stair and φ.
    """

    rule = "scale"
    minimum: float | None = None

    def forward(self, steps: int) -> torch.Tensor:
        """The first `steps` numbers → (steps,) or (steps, H). Raises ValueError when the stair is shorter than that."""
        if steps > len(self.numbers):
            raise ValueError(f"the stair has {len(self.numbers)} steps, the sequence {steps}; build a longer stair")
        return self.numbers[:steps]


class FixedStair(Stair):
    """nvar: ρ_t from `SCHEDULES`, nothing to learn."""

    def __init__(self, name: str, steps: int):
        super().__init__()
        self.register_buffer("numbers", schedule(name, steps).to(torch.get_default_dtype()), persistent=False)


class LearnedStair(Stair):
    """alpha: α_t learned, one per step, all started at `start`."""

    def __init__(self, steps: int, start: float = 1.0):
        super().__init__()
        self.numbers = nn.Parameter(torch.full((steps,), float(start)))


class ExponentialStair(LearnedStair):
    """expalpha: 1 − exp(−α_t |z|), α_t ≥ 0 learned, all started at `start`.

    A start near 0 makes h ≈ α|z|φ(z) and forgets; 20 is close to the plain network. `literal=True` is
    the formula in the authors' code, z in the place of |z|: unbounded for z < 0, here only for comparison.
    """

    minimum = 0.0

    def __init__(self, steps: int, start: float = 20.0, literal: bool = False):
        super().__init__(steps, start)
        self.rule = "literal" if literal else "exponential"
