"""The head of a report: which checkpoint and which baseline were compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.checkpoint.provenance import Provenance
from quantkit.validation.preflight import Candidate
from quantkit.validation.reports.report import recipe_digest
from quantkit.verification import VerifyReport


def described(candidate: Candidate, integrity: VerifyReport) -> dict[str, Any]:
    """The checkpoint: how it was made, its layout, schemes and size."""
    provenance = candidate.provenance or Provenance()
    return {
        "name": candidate.path.resolve().name,
        "method": provenance.method,
        "recipe_digest": recipe_digest(provenance.recipe),
        "layout": integrity.format,
        "schemes": dict(Counter(layer.scheme for layer in integrity.layers)),
        "weight_bytes": candidate.held.weight_bytes,
        **({"experts": asdict(provenance.experts)} if provenance.experts else {}),
    }


def baseline_name(asked: str, candidate: Candidate) -> str:
    """The baseline as it, or else quantkit.json, names it, a directory by its last part: reports
    are published."""
    named = asked or candidate.source.name
    base = candidate.baseline
    return base.path.resolve().name if Path(named).expanduser().exists() else named


def first_notes(candidate: Candidate, fingerprint: str, seen: float | None) -> list[str]:
    """What is to be known before anything is measured; `seen` as `seen_by_calibration` gives it."""
    notes = []
    if candidate.provenance is not None and candidate.source.fingerprint != fingerprint:
        notes.append("the baseline is not the model that this checkpoint was made from")
    if seen is None:
        notes.append("whether calibration saw the text is unknown: its tokens are not at hand")
    return notes
