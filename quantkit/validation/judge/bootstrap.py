"""How sure a measured number is: percentile bootstrap over windows or questions.

Both models see the same windows, so that windows are resampled in pairs (Efron and Tibshirani
1993, chapter 13): what is hard for both moves neither a ratio nor a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
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
    means = [values[draws].mean(axis=1) for draws in resamples(len(values))]
    return Measured(value, percentiles(finish(np.concatenate(means))), sampled=True)


def resamples(count: int, most: int = RESAMPLES) -> Iterator[NDArray[np.int64]]:
    """`most` rows of indices [rows, count], drawn with replacement, in parts of up to
    `PART_INDICES`; the same for the same count."""
    dice = np.random.default_rng(0)
    rows = max(1, PART_INDICES // count)
    for start in range(0, most, rows):
        yield dice.integers(0, count, (min(rows, most - start), count))


def percentiles(values: Floats) -> tuple[float, float]:
    """The middle `LEVEL` of bootstrapped values."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
