"""How sure a measured number is: bootstrap over windows or questions (Efron and Tibshirani 1993).

Both models see the same windows, so that windows are resampled in pairs: what is hard for both
moves neither a ratio nor a difference. Means get the bias-corrected and accelerated interval
(BCa, chapter 14): a few hard windows make the KL divergence skewed, and a percentile interval of a
skewed mean ends too low. `scipy.stats.bootstrap` gives the same (a test compares), but finds the
acceleration by leaving out one sample after another, whose cost grows with their square; that of
a mean has a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
PART_INDICES = 1 << 20
"""Indices held at a time, 8 MB: a task may have tens of thousands of samples."""
FEWEST = 8
"""Samples under which an interval would be too narrow to be believed."""


@dataclass(frozen=True)
class Measured:
    """A metric's value with its 95 % interval.

    `interval` is None where the value is exact (`sampled` false), or there are too few samples.
    `why` says why there is no value.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    sampled: bool = False
    why: str = ""


def exact(value: float) -> Measured:
    """A count or a measurement of the weights: another sample would not change it."""
    return Measured(float(value))


def missing(why: str) -> Measured:
    """A metric that this run could not measure."""
    return Measured(None, why=why)


def sampled(values: Floats, statistic: Callable[[Floats], Floats] | None = None) -> Measured:
    """The mean over `values` [n], and `statistic` of that mean (None: itself), with its interval.

    `statistic` must be monotonic.
    """
    finish = statistic or (lambda mean: mean)
    value = float(finish(np.asarray(values.mean())))
    if not np.isfinite(values).all():
        return Measured(float("nan"), sampled=True)
    if len(values) < FEWEST:
        return Measured(value, sampled=True)
    means = np.concatenate([values[draws].mean(axis=1) for draws in resamples(len(values))])
    low, high = np.sort(finish(np.quantile(means, _bca_tails(values, means))))
    return Measured(value, (float(low), float(high)), sampled=True)


def between(least: Measured, value: Measured, most: Measured) -> Measured:
    """A value that was estimated, with the interval of its bounds; none where one has none."""
    if least.interval is None or most.interval is None:
        return value
    return Measured(value.value, (least.interval[0], most.interval[1]), sampled=True)


def ratio(values: Floats, others: Floats) -> Measured:
    """The mean of `values` over that of `others`, of the same windows [n], with its percentile
    interval; both are resampled together. Missing where the others are nothing."""
    if others.mean() <= 0:
        return missing("rounding to nearest loses nothing here")
    value = float(values.mean() / others.mean())
    if not np.isfinite(value) or len(values) < FEWEST:
        return Measured(value, sampled=True)
    with np.errstate(divide="ignore"):
        found = [
            values[draws].mean(axis=1) / others[draws].mean(axis=1)
            for draws in resamples(len(values))
        ]
    return Measured(value, percentiles(np.concatenate(found)), sampled=True)


def resamples(count: int, most: int = RESAMPLES) -> Iterator[NDArray[np.int64]]:
    """`most` rows of indices [rows, count], drawn with replacement, in parts of up to
    `PART_INDICES`; the same for the same count."""
    dice = np.random.default_rng(0)
    rows = max(1, PART_INDICES // count)
    for start in range(0, most, rows):
        yield dice.integers(0, count, (min(rows, most - start), count))


def percentiles(values: Floats) -> tuple[float, float]:
    """The middle `LEVEL` of bootstrapped values."""
    low, high = np.quantile(values, TAILS)
    return float(low), float(high)


def _bca_tails(values: Floats, means: Floats) -> list[float]:
    """The quantiles of the resampled `means` of `values` at which BCa ends (equation 14.10)."""
    mean = values.mean()
    squares = float(((values - mean) ** 2).sum())
    if squares == 0:  # every mean is the same
        return list(TAILS)
    acceleration = float(((values - mean) ** 3).sum()) / (6 * squares**1.5)
    below = float((means < mean).mean() + (means <= mean).mean()) / 2
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    shifted = [bias + normal.inv_cdf(tail) for tail in TAILS]
    return [normal.cdf(bias + z / (1 - acceleration * z)) for z in shifted]
