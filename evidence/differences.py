"""Differences of two means over seeds: Welch's t interval, and Holm's adjustment of a family of comparisons.

    t = (mean a − mean b) / √(v_a/n_a + v_b/n_b)      v: variances; ν degrees of freedom after Welch and Satterthwaite

Of m comparisons, taken by their p values from the smallest on, the k-th (from 0) holds where p < 0.05 / (m − k) and
all before it hold. Then the chance that any of the differences said to hold is none is at most 5 %.
"""

import math
import statistics
from dataclasses import dataclass

import torch

LEVEL = 0.05


@dataclass
class Difference:
    """mean a − mean b, its 95 % interval (not a number with one seed), and whether it holds in its family."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = 1.0
    holds: bool = False


def p_value(t: float, freedom: float) -> float:
    """The chance of a larger |t| when there is no difference. With t = √ν tan θ the density is ∝ cos^(ν−1) θ."""
    start = math.atan(abs(t) / math.sqrt(freedom))
    tail, whole = (torch.linspace(low, math.pi / 2, 20_001, dtype=torch.float64) for low in (start, 0.0))
    return (torch.trapezoid(tail.cos().clamp(min=0) ** (freedom - 1), tail)
            / torch.trapezoid(whole.cos().clamp(min=0) ** (freedom - 1), whole)).item()


def quantile(freedom: float) -> float:
    """The t whose p value is 0.05, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, freedom) > LEVEL else (low, middle)
    return high


def difference(a: list[float], b: list[float]) -> Difference:
    """The difference of the means of `a` and `b`, not yet judged."""
    mean = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return Difference(mean)
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Difference(mean)
    freedom = sum(parts) ** 2 / sum(part ** 2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    reach = quantile(freedom) * error
    return Difference(mean, mean - reach, mean + reach, p_value(mean / error, freedom))


def judged(pairs: dict) -> dict[object, Difference]:
    """{name: (a, b)} → {name: the difference}, with Holm's adjustment over all that have an interval."""
    found = {name: difference(*pair) for name, pair in pairs.items() if all(pair)}
    family = sorted((d for d in found.values() if not math.isnan(d.low)), key=lambda d: d.p)
    for place, one in enumerate(family):
        if one.p >= LEVEL / (len(family) - place):
            break
        one.holds = True
    return found
