"""What a validation measured, written into the checkpoint's quantkit.json and model card.

Both files are outside of the seal (`verify.provenance`), so that the checkpoint still verifies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.directory import read_json
from quantkit.checkpoint.provenance import PROVENANCE
from quantkit.pipeline.card import with_measured
from quantkit.pipeline.seal import CARD


def record(directory: Path, document: Mapping[str, Any]) -> bool:
    """Write `results.validation` and the card's numbers; False where there is no quantkit.json, or
    it cannot be written."""
    file = directory / PROVENANCE
    if not file.is_file() or not os.access(directory, os.W_OK):
        return False
    try:
        _write(directory, file, document)
    except OSError:  # a full or read-only disk
        return False
    return True


def _write(directory: Path, file: Path, document: Mapping[str, Any]) -> None:
    provenance = read_json(file)
    provenance["results"] = {**(provenance.get("results") or {}), "validation": summary(document)}
    _replace(file, json.dumps(provenance, indent=2, ensure_ascii=False) + "\n")
    card = directory / CARD
    if card.is_file():
        _replace(card, with_measured(card.read_text(encoding="utf-8"), provenance))


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """The report without its raw material."""
    kept = ("quantkit_version", "ok", "undecided", "baseline", "engine", "text", "gates",
            "metrics", "values", "throughput", "notes", "warnings")  # fmt: skip
    return {key: document[key] for key in kept}


def _replace(file: Path, text: str) -> None:
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    staged.chmod(file.stat().st_mode & 0o777)
    staged.replace(file)
