"""What a few seeds allow to say: means, paired differences with intervals, and verdicts that hold over all comparisons at once."""

import functools
import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of the intervals; a verdict needs an adjusted p value below 1 - LEVEL


def t_tail(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t with `freedom` degrees of freedom, to 1e-9.

    The tail is an integral of cos(angle)^(freedom - 1) over the angle atan(t / sqrt(freedom)): smooth and finite, unlike the density's.
    """
    if math.isinf(t):
        return 0.0
    angles = np.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, 20001)
    weights = np.full(len(angles), 2.0)  # Simpson's rule: 1 4 2 4 ... 4 1
    weights[1::2], weights[[0, -1]] = 4.0, 1.0
    integral = float(weights @ np.maximum(np.cos(angles), 0.0) ** (freedom - 1)) * (angles[1] - angles[0]) / 3
    half = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))  # the integral from 0 on
    return min(1.0, integral / half)


@functools.cache
def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t with P(|T| >= t) = 1 - level, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """Paired differences over seeds: their mean, the interval of the mean at LEVEL and the two-sided p value (nan with one seed)."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """ours - theirs over the seeds (pair numbers) that both have; None where there is none. Student's t on the differences."""
    values = np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    if not len(values):
        return None
    mean = float(values.mean())
    if len(values) == 1:
        return Difference(mean, math.nan, math.nan, math.nan, 1)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = t_quantile(len(values) - 1) * error
    p = t_tail(mean / error, len(values) - 1) if error else float(mean == 0)
    return Difference(mean, mean - reach, mean + reach, p, len(values))


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p values: with them, the chance of any false verdict among all comparisons is at most 1 - LEVEL. nan stays nan."""
    known = sorted((name for name in p if not math.isnan(p[name])), key=p.__getitem__)
    adjusted, largest = dict(p), 0.0
    for place, name in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p[name]))
        adjusted[name] = largest
    return adjusted


def verdict(name: str, other: str, difference: Difference | None, adjusted: float) -> str:
    """One line that says what the evidence supports, for example "cwd > none: +1.8 [1.1, 2.4], n=3, p=0.01"."""
    if difference is None:
        return f"{name} vs {other}: no seed in common"
    if difference.seeds == 1:
        return f"{name} vs {other}: {difference.mean:+.2f} with one seed, which says nothing about another seed"
    numbers = f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
    if adjusted < 1 - LEVEL:
        return f"{name} {'>' if difference.mean > 0 else '<'} {other}: {numbers}, n={difference.seeds}, p={adjusted:.2g}"
    return f"{name} vs {other}: undecided ({numbers}, n={difference.seeds}, p={adjusted:.2g})"
