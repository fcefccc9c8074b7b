"""Differences of two means over seeds: Welch's t interval, and Holm's adjustment of a family of comparisons.

Of m comparisons, taken by their p values from the smallest on, the k-th (from 0) holds where p < 0.05 / (m − k) and
all before it hold. Then the chance that any of the differences said to hold is none is at most 5 %.
"""

import math
import statistics
from dataclasses import dataclass

from common.errors import UserError

LEVEL = 0.05


@dataclass
class Difference:
    """mean a − mean b, its 95 % interval (not a number with one seed), and whether it holds in its family."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = 1.0
    holds: bool = False


def tests():
    """scipy.stats, which only these tables need."""
    try:
        import scipy.stats
    except ImportError:
        raise UserError("intervals need scipy; install it with pip install scipy") from None
    return scipy.stats


def difference(a: list[float], b: list[float]) -> Difference:
    """The difference of the means of `a` and `b`, not yet judged."""
    mean = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2 or len({*a}) == len({*b}) == 1:
        return Difference(mean)
    found = tests().ttest_ind(a, b, equal_var=False)
    return Difference(mean, *map(float, found.confidence_interval(1 - LEVEL)), float(found.pvalue))


def is_within(value: float, sample: list[float]) -> bool:
    """Whether `value` lies in the 95 % t interval of the mean of `sample`."""
    return bool(tests().ttest_1samp(sample, value).pvalue >= LEVEL)


def judged(pairs: dict) -> dict[object, Difference]:
    """{name: (a, b)} → {name: the difference}, with Holm's adjustment over all that have an interval."""
    found = {name: difference(*pair) for name, pair in pairs.items() if all(pair)}
    family = sorted((d for d in found.values() if not math.isnan(d.low)), key=lambda d: d.p)
    for place, one in enumerate(family):
        if one.p >= LEVEL / (len(family) - place):
            break
        one.holds = True
    return found
