"""Problems for the time loop, and how far an engine is from the float64 reference on them."""

import itertools
import math

import torch

from common.recurrence import agreement
from common.stair import NONLINEARITIES, RULES

FORMULAS = list(itertools.product(RULES, NONLINEARITIES))


def problem(rule, phi, steps, batch, hidden, dtype=torch.float64, device="cpu"):
    """x, W, h0, numbers, b: leaves of a size at which nothing saturates or explodes, negative numbers among them."""
    random = torch.Generator().manual_seed(1000 * steps + 10 * hidden + batch)
    size = 0.3 if rule == "literal" else 0.8

    def leaf(*shape, scale=1.0, shift=0.0):
        made = torch.randn(shape, generator=random, dtype=torch.float64) * scale + shift
        return made.to(device, dtype).requires_grad_()

    numbers = leaf(steps, scale=0.3, shift=-0.7) if rule == "scale" else leaf(steps, scale=0.05, shift=0.4)
    bias = leaf(hidden, scale=0.1) if phi == "modrelu" else None
    return [leaf(steps, batch, hidden, scale=size, shift=0.1), leaf(hidden, hidden, scale=size / hidden**0.5),
            leaf(batch, hidden, scale=0.5), numbers, bias]


def errors(engine, *problem_and_case) -> dict:
    """Of the engine's result and of every gradient, relative to the largest number of each."""
    found = agreement.errors(agreement.solve(engine, *problem_and_case), *problem_and_case)
    assert all(math.isfinite(error) for error in found.values())
    return found


def worst(*given) -> float:
    """The largest error of `errors`."""
    return max(errors(*given).values())
