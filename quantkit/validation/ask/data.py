"""The text that both models read: held-out windows, and a check that calibration never saw them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from quantkit.calibration import build_tokens, load_calibration
from quantkit.calibration.heldout import HELD_OUT_FROM, held_out_texts, seen_share
from quantkit.calibration.rows import guess_fields, read_rows
from quantkit.calibration.tokenfile import TokenFile, read_token_file
from quantkit.calibration.tokenizer import Tokenizer
from quantkit.checkpoint.paths import cache_dir
from quantkit.checkpoint.provenance import Provenance
from quantkit.errors import InputError
from quantkit.recipe.model import Recipe

WINDOW = 512
HELD_OUT = f"State of the Union addresses of {HELD_OUT_FROM} and later"
MOST_SEEN = 0.01
"""Share of 13-token runs that calibration may have seen: quotations and stock phrases."""


@dataclass(frozen=True)
class EvalText:
    """Windows [n, length] of token ids; `digest` names them, `name` says what they are."""

    name: str
    windows: NDArray[np.int64]
    digest: str


def eval_text(
    data: Path | None, tokenizer: Tokenizer, samples: int, max_length: int | None
) -> EvalText:
    """`samples` windows, spread evenly over the held-out text or the file's documents.

    A tokenizer that begins documents with a token of its own begins every window with it.
    Raises InputError for a file that cannot be read or gives fewer windows.
    """
    texts = held_out_texts() if data is None else read_texts(data)
    name = HELD_OUT if data is None else data.name
    length = min(WINDOW, max_length or WINDOW)
    special = tokenizer.encode("", True)
    begin = special[:1]
    room = length - len(begin)
    windows = []
    for text in texts:
        ids = tokenizer.encode(text, False)
        windows += [begin + ids[at : at + room] for at in range(0, len(ids) - room + 1, room)]
    if len(windows) < samples:
        raise InputError(
            f"{name} gives {len(windows)} windows of {length} tokens, fewer than {samples}.",
            hint=f"--samples {len(windows)}" if windows else "--data with a longer text",
            code="validate.too_little_text",
        )
    chosen = np.linspace(0, len(windows) - 1, samples).round().astype(int)
    array = np.array([windows[index] for index in chosen], dtype=np.int64)
    return EvalText(name, array, hashlib.sha256(array.tobytes()).hexdigest())


def read_texts(file: Path) -> list[str]:
    """The documents of a .txt file (one), or of a .jsonl, .json, .csv or .parquet file."""
    if not file.is_file():
        raise InputError(
            f"The data file {file} does not exist.",
            hint="--data FILE, or leave it out for the held-out text",
            code="validate.data_missing",
        )
    if file.suffix.lower() == ".txt":
        return [file.read_text(encoding="utf-8", errors="replace")]
    field = guess_fields(file).get("text_field")
    if not isinstance(field, str):
        raise InputError(
            f"{file.name} holds conversations; perplexity is measured on plain text.",
            hint="--data with a field named text",
            code="validate.data_conversations",
        )
    return [str(row[field]) for row in read_rows(file, [field])]


def seen_by_calibration(text: EvalText, provenance: Provenance | None, model: Path) -> float | None:
    """The share of the windows' 13-token runs that the checkpoint's calibration holds.

    The calibration's tokens come from the cache, or are made again for `model`, the baseline.
    0 for a checkpoint made without calibration; None where its tokens cannot be had.
    """
    if provenance is None:
        return None
    if provenance.calibration is None:
        return 0.0
    digest = str(provenance.calibration.digest)
    tokens = _cached_tokens(digest) or _tokens_again(provenance, model)
    if tokens is None or tokens.digest != digest:
        return None
    return seen_share(tokens, list(text.windows))


def refuse_seen(text: EvalText, share: float) -> None:
    """InputError when calibration saw the text: its perplexity would flatter the checkpoint."""
    if share > MOST_SEEN:
        raise InputError(
            f"{share:.0%} of {text.name} was in the calibration of this checkpoint.",
            hint="--data with a text that was not, or leave --data out",
            code="validate.leakage",
        )


def _cached_tokens(digest: str) -> TokenFile | None:
    """The token file of a digest, where this machine made it or has it still."""
    folder = cache_dir() / "calibration"
    for summary in sorted(folder.glob("*.json")):
        try:
            stated = json.loads(summary.read_text(encoding="utf-8")).get("digest")
        except (OSError, ValueError, AttributeError):
            continue
        if stated == digest:
            return read_token_file(summary.with_suffix(".safetensors"))
    return None


def _tokens_again(provenance: Provenance, model: Path) -> TokenFile | None:
    """The recipe's calibration made again; None where its sources are not here any more."""
    try:
        choice = Recipe.model_validate(provenance.recipe).calibration
        if choice is None:
            return None
        return build_tokens(load_calibration(choice.name, choice.overrides()), model)
    except (InputError, ValidationError):
        return None
