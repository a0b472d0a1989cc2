"""Whether a baseline answers at all: one that does not tells nothing of a checkpoint.

Its perplexity is held against the text's own word counts: a model that knows nothing but how often
each token of the text occurs has the perplexity exp(H), H being the entropy of these frequencies
(Shannon 1948). A baseline at or over it predicts nothing from what it reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import InputError, command


def silence(windows: NDArray[np.int64], logprobs: NDArray[np.float32]) -> str | None:
    """A sentence on a baseline that answers nothing, None for one that does.

    windows: token ids [n, length]; logprobs: of every next token, [n, length - 1].
    """
    perplexity, counted = float(np.exp(-logprobs.mean(dtype=np.float64))), by_counting(windows)
    if perplexity < counted:
        return None
    return (
        f"the baseline answers nothing: its perplexity is {perplexity:.4g}, and counting the "
        f"tokens of the text alone gives {counted:.4g}"
    )


def by_counting(windows: NDArray[np.int64]) -> float:
    """The perplexity of the tokens to predict under their own frequencies."""
    _, counts = np.unique(windows[:, 1:], return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def refuse_silent(sentence: str, path: Path, baseline: Path) -> None:
    """InputError of a checkpoint at `path` whose baseline `silence` says this of."""
    again = command("validate", path, "--baseline", baseline, "--broken-baseline")
    raise InputError(
        f"{sentence[0].upper()}{sentence[1:]}; a checkpoint cannot be measured against it.",
        hint=f"--baseline with the model's whole 16-bit weights, or {again}",
        code="validate.broken_baseline",
    )
