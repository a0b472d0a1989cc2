"""The cache arm: the same text with the key-value cache in 16 bit, where it is quantized.

What the cache costs is then told apart from what the weights do, and its scales are held against
the keys and values that the text really makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantkit.backends.process.job import Reporter
from quantkit.validation.ask.text import BaselineText, QuantizedText, measure_quantized
from quantkit.validation.subjects.base import Subject

if TYPE_CHECKING:
    from quantkit.runtime.network.cache_rounding import CacheScales, CacheWatch

FP8_MAX = 448.0


@runtime_checkable
class WithCache(Protocol):
    """A subject that shows its key-value cache."""

    @property
    def cache_scales(self) -> Mapping[int, CacheScales]:
        """Decoder layer → its scales; empty for a cache in 16 bit."""
        ...

    def cache_in_16_bit(self) -> AbstractContextManager[Mapping[int, CacheWatch]]:
        """Compute without rounding it inside the block; layer → what it held."""
        ...


@dataclass(frozen=True)
class CacheAnswers:
    """`text`: what the model says with its cache in 16 bit. scales: of every layer's keys and
    values, stored / what takes the largest of them on the text to FP8's end, [2 × layers]; empty
    for other formats."""

    text: QuantizedText
    scales: NDArray[np.float64]


def ask_cache(
    subject: Subject, windows: NDArray[np.int64], baseline: BaselineText, ui: Reporter
) -> CacheAnswers | None:
    """The arm of a subject whose cache is quantized; None of others."""
    if not isinstance(subject, WithCache) or not subject.cache_scales:
        return None
    stored = subject.cache_scales
    ui.stage("quantized: text, its cache in 16 bit", len(windows))
    with subject.cache_in_16_bit() as seen:
        text = measure_quantized(subject, windows, baseline, lambda done, _: ui.advance(done))
    pairs = [
        pair
        for index, held in seen.items()
        if stored[index].element == "fp8"
        for pair in ((stored[index].keys, held.keys), (stored[index].values, held.values))
    ]
    return CacheAnswers(text, np.array([s / (m / FP8_MAX) for s, m in pairs if m > 0]))
