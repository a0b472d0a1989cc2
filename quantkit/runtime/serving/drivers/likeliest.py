"""The likeliest tokens at every position, as drivers hand them over: one file of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantkit.runtime.serving.drivers.base import Ids


class LikeliestTokens:
    """`logprobs` [n, length - 1] of the tokens that follow; `ids` and `kept` [n, length - 1, count]
    of the likeliest, the first one first."""

    def __init__(self, windows: Sequence[Ids], count: int) -> None:
        import numpy as np

        shape = (len(windows), len(windows[0]) - 1)
        self.logprobs = np.empty(shape, dtype=np.float32)
        self.ids = np.empty((*shape, count), dtype=np.int32)
        self.kept = np.empty((*shape, count), dtype=np.float32)

    def put(
        self, window: int, position: int, follows: float, pairs: Iterable[tuple[float, int]]
    ) -> None:
        """One position: the log-probability of what follows, and (log-probability, id) of the
        likeliest in order; ValueError when there are fewer than `count`."""
        self.logprobs[window, position] = follows
        self.kept[window, position], self.ids[window, position] = zip(*pairs, strict=True)

    def write(self, file: str) -> None:
        import numpy as np

        np.savez(file, logprobs=self.logprobs, ids=self.ids, kept=self.kept)
