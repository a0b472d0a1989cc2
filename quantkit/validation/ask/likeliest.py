"""KL divergence from the likeliest tokens alone, which is what engines tell of a distribution.

Of the baseline P and the quantized model Q a position has the likeliest tokens of each. C are
the tokens that both have, A those of P alone, R all others. Over C the sum of p log p/q is exact,
and merging A into one token, and R, can only make a divergence smaller (log-sum inequality; Cover
and Thomas 2006, theorem 2.7.1):

    low = sum over C of p log p/q  +  p(A) log p(A)/q(A)  +  p(R) log p(R)/q(R)

with the q(A) that makes it least, no token of A having more than Q's last one, is a lower bound of
KL(P‖Q). An upper bound there is none, since nothing is known of Q's unlikeliest tokens, but an
estimate: the gaps g = log p/q of a position are taken as normal. Mean and variance come from the
tokens of P by maximum likelihood, where one that Q has not told counts as a gap of at least so much
that it falls under Q's last one (Tobin 1958; by expectation and maximization). They give the
expected g in A; in R the sum is p log p/q of the whole, and half of the variance. What is
estimated, the value less `low`, may be twice as large: `high`. A test holds all three against full
logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEPS = 20
"""Of expectation and maximization."""
LEAST_MASS = 1e-6
"""What float32 logarithms leave of a mass that is none."""
RULED_OUT = -100.0
"""The log-probability of a token that has none."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """KL in nats of each position [n], with its bounds."""

    value: Floats
    low: Floats
    high: Floats


def divergence(
    base_ids: NDArray[np.int32],
    base: NDArray[np.float32],
    ids: NDArray[np.int32],
    ours: NDArray[np.float32],
) -> Divergence:
    """KL(P‖Q) at n positions from the likeliest tokens of P and those of Q: ids and
    log-probabilities [n, k]. Not a number where one of these is none."""
    base, ours = np.maximum(base, RULED_OUT), np.maximum(ours, RULED_OUT)
    wanted, told = base.astype(np.float64), _of_the_same(base_ids, ids, ours)
    common = np.isfinite(told)
    chance = np.exp(wanted)
    gaps = np.where(common, wanted - told, wanted - ours.min(-1, keepdims=True))
    exact = np.where(common, chance * gaps, 0.0).sum(-1)
    ours_common = np.exp(told, where=common, out=np.zeros_like(told)).sum(-1)
    untold, outside = np.where(common, 0.0, chance).sum(-1), 1 - chance.sum(-1)
    rest = (1 - ours_common).clip(LEAST_MASS)
    most = (~common).sum(-1) * np.exp(ours.min(-1).astype(np.float64))
    least = np.minimum(rest * untold / (untold + outside).clip(LEAST_MASS), most)
    low = (exact + _whole(untold, least) + _whole(outside, rest - least)).clip(0)
    expected, ours_untold, variance = _untold(gaps, common, wanted)
    value = exact + np.where(common, 0.0, chance * expected).sum(-1)
    value += _whole(outside, rest - ours_untold) + outside.clip(0) * variance / 2
    value = np.maximum(value, low)
    return Divergence(value, low, 2 * value - low)


def _whole(mass: Floats, other: Floats) -> Floats:
    """p log p/q of a cell with those masses; what rounding leaves of none counts as none."""
    none = mass < LEAST_MASS
    return np.where(none, 0.0, mass * np.log(mass.clip(LEAST_MASS) / other.clip(1e-30)))


def _untold(
    gaps: Floats, common: NDArray[np.bool_], wanted: Floats
) -> tuple[Floats, Floats, Floats]:
    """What the gaps of P's tokens [n, k] tell of those that are not common, whose `gaps` are their
    least: the expected gap [n, k], the mass that Q gives them [n], and the variance [n]."""
    mean = np.where(common, gaps, 0.0).sum(-1) / common.sum(-1).clip(1)
    square = np.where(common, (gaps - mean[:, None]) ** 2, 0.0).sum(-1) / common.sum(-1).clip(1)
    variance = square.clip(LEAST_MASS)
    expected = gaps
    for _ in range(STEPS):
        middle, width = mean[:, None], np.sqrt(variance)[:, None]
        at = (gaps - middle) / width
        over = np.exp(-at * at / 2 - _log_tail(at)) / np.sqrt(2 * np.pi)
        expected = np.where(common, gaps, middle + width * over)
        spread = np.where(common, 0.0, width**2 * (1 + over * (at - over))).clip(0)
        mean = expected.mean(-1)
        variance = ((expected - mean[:, None]) ** 2 + spread).mean(-1).clip(LEAST_MASS)
    middle, width = mean[:, None], np.sqrt(variance)[:, None]
    at = (gaps - middle) / width
    share = _log_tail(at + width) - _log_tail(at)
    given = np.exp(wanted - middle + width**2 / 2 + share)
    return expected, np.where(common, 0.0, given).sum(-1), variance


def _of_the_same(
    base_ids: NDArray[np.int32], ids: NDArray[np.int32], ours: NDArray[np.float32]
) -> Floats:
    """Q's log-probabilities of P's tokens [n, k]; NaN where Q has not told them."""
    rows = np.arange(len(ids), dtype=np.int64)[:, None] << 32
    keys, wanted = (rows | ids).ravel(), (rows | base_ids).ravel()
    order = np.argsort(keys)
    place = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
    at = order[place]
    return np.where(keys[at] == wanted, ours.ravel()[at], np.nan).reshape(base_ids.shape)


def _log_tail(at: Floats) -> Floats:
    """Logarithm of the chance that a standard normal exceeds `at`."""
    import torch

    found: Floats = torch.special.log_ndtr(torch.from_numpy(-at)).numpy()
    return found
