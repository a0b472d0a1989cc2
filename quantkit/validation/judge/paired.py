"""Right or wrong on the same questions: how sure is the difference of two models?

Where few or no answers differ, resampling them gives an interval of no width, however few there
are. The score interval of a difference of paired proportions (Tango 1998, Statistics in Medicine
17:891-908) has one: without any difference among n answers it is ± z² / (n + z²).
"""

from __future__ import annotations

from math import copysign, inf, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from quantkit.validation.judge.bootstrap import FEWEST, LEVEL, Measured, sampled

Floats = NDArray[np.float64]

_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_STEPS = 60


def lost(before: Floats, after: Floats) -> Measured:
    """The mean of before - after over the same samples [n], with its interval.

    Samples that are right (1, or -1 where less is better) or wrong (0) get a score interval, others
    a bootstrap one.
    """
    differences = before - after
    if len(before) < FEWEST or not _right_or_wrong(np.concatenate((before, after))):
        return sampled(differences)
    more, fewer = int((differences > 0).sum()), int((differences < 0).sum())
    interval = score_interval(more, fewer, len(before))
    return Measured(float(differences.mean()), interval, sampled=True)


def score_interval(more: int, fewer: int, count: int) -> tuple[float, float]:
    """The interval of (more - fewer) / count, of `count` pairs of which so many differ."""
    middle = (more - fewer) / count

    def end(outside: float) -> float:
        inside = middle
        for _ in range(_STEPS):
            half = (inside + outside) / 2
            if abs(_score(half, more, fewer, count)) < _Z:
                inside = half
            else:
                outside = half
        return inside

    return end(-1.0), end(1.0)


def _score(delta: float, more: int, fewer: int, count: int) -> float:
    """Tango's statistic of the hypothesis that the difference is `delta`."""
    b = -more - fewer + (2 * count - more + fewer) * delta
    c = -fewer * delta * (1 - delta)
    share = (sqrt(max(b * b - 8 * count * c, 0.0)) - b) / (4 * count)
    off = more - fewer - count * delta
    variance = count * (2 * share + delta * (1 - delta))
    if variance <= 0:
        return copysign(inf, off) if off else 0.0
    return off / sqrt(variance)


def _right_or_wrong(values: Floats) -> bool:
    return any(bool(np.isin(values, (0.0, right)).all()) for right in (1.0, -1.0))
