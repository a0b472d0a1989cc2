"""What a validation measured, written into the checkpoint's quantkit.json and model card.

Both files are outside of the seal (`verification/files/digests.py`): the checkpoint still verifies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.provenance import CARD, PROVENANCE, add_validation, replace_text
from quantkit.pipeline.card import with_measured


def record(directory: Path, document: Mapping[str, Any]) -> bool:
    """Write `results.validation` and the card's numbers; False where there is no quantkit.json, or
    it cannot be written."""
    if not (directory / PROVENANCE).is_file() or not os.access(directory, os.W_OK):
        return False
    try:
        _write(directory, document)
    except OSError:  # a full or read-only disk
        return False
    return True


def _write(directory: Path, document: Mapping[str, Any]) -> None:
    provenance = add_validation(directory, summary(document))
    card = directory / CARD
    if card.is_file():
        replace_text(card, with_measured(card.read_text(encoding="utf-8"), provenance))


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """The report without its raw material."""
    kept = ("quantkit_version", "ok", "undecided", "baseline", "engine", "text", "gates",
            "metrics", "values", "reference", "throughput", "notes", "warnings")  # fmt: skip
    return {key: document[key] for key in kept}
