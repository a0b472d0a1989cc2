"""The report of a validation as one JSON document; Markdown, HTML and JUnit are made from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit import __version__
from quantkit.validation.ask.canary import Answer
from quantkit.validation.judge.bootstrap import Measured
from quantkit.validation.judge.metrics import PerWindow
from quantkit.validation.judge.regression import Change
from quantkit.validation.judge.verdicts import GateResult
from quantkit.validation.online import OnlineResult
from quantkit.validation.subjects.base import Throughput
from quantkit.verification import LayerFidelity

SCHEMA_VERSION = 1
KIND = "quantkit.validation"
_KL_EDGES = np.logspace(-6, 2, 49)


@dataclass(frozen=True)
class Both:
    """Something of the baseline, and the same of the quantized model."""

    baseline: Any
    quantized: Any


@dataclass
class Report:
    """What one validation measured.

    checkpoint, baseline, engine, text: who was compared, how, and on what. metrics: what gates can
    be held against, measured or not; values, windows (means over each), right (facts answered), …:
    what they were derived from; routing: of a mixture of experts, by decoder layer the share of
    tokens that the baseline's experts compute; images: which pictures a model with a vision tower
    was shown, and what is lost on each. reference: the baseline rounded to nearest in the
    checkpoint's formats, and the share of its loss that the checkpoint recovers. changes: since an
    earlier report, where there is one. online: the baseline as an engine's own method quantizes it
    while it loads.
    """

    checkpoint: dict[str, Any]
    baseline: dict[str, Any]
    engine: dict[str, Any]
    text: dict[str, Any]
    layers: list[LayerFidelity]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    metrics: dict[str, Measured] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    values: dict[str, Both] = field(default_factory=dict)
    windows: PerWindow | None = None
    right: Both = Both((), ())
    canary: list[dict[str, Any]] = field(default_factory=list)
    throughput: Both = Both(None, None)
    kl_histogram: dict[str, Any] | None = None
    routing: dict[int, float] = field(default_factory=dict)
    images: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    changes: list[Change] | None = None
    online: OnlineResult | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no gate failed or went unmeasured, and nothing became worse than in an earlier
        report. A sample that is too small to say fails nothing: see `undecided`."""
        worse = any(change.verdict == "worse" for change in self.changes or ())
        return all(gate.held for gate in self.gates) and not worse

    @property
    def undecided(self) -> int:
        """Gates that were measured on a sample too small to say."""
        return sum(gate.held and gate.verdict == "undecided" for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """The document: plain JSON values, NaN as null."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "quantkit_version": __version__,
            "ok": self.ok,
            "undecided": self.undecided,
            "checkpoint": self.checkpoint,
            "baseline": self.baseline,
            "engine": self.engine,
            "text": self.text,
            "gates": [gate.to_json() for gate in self.gates],
            "metrics": {
                name: {"value": m.value, "interval": m.interval, "why": m.why}
                for name, m in self.metrics.items()
            },
            "values": {name: vars(both) for name, both in self.values.items()},
            "canary": self.canary,
            "throughput": {
                name: asdict(value) if isinstance(value, Throughput) else None
                for name, value in vars(self.throughput).items()
            },
            "layers": [asdict(layer) for layer in self.layers],
            "kl_histogram": self.kl_histogram,
            "routing": [
                {"layer": layer, "agreement": share} for layer, share in self.routing.items()
            ],
            "images": self.images,
            "reference": self.reference,
            "windows": {k: _list(v) for k, v in vars(self.windows).items()} if self.windows else {},
            "right": {name: [int(v) for v in value] for name, value in vars(self.right).items()},
            "regression": None if self.changes is None else [asdict(c) for c in self.changes],
            "online": self.online and self.online.to_json(),
            "notes": self.notes,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 1),
        }
        plain: dict[str, Any] = _without_nan(document)
        return plain


def recipe_digest(recipe: Mapping[str, Any] | None) -> str | None:
    """SHA-256 of a resolved recipe, gates aside: they judge the result, they do not make it."""
    if recipe is None:
        return None
    made_by = {key: value for key, value in recipe.items() if key not in ("gates", "description")}
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def conversations(baseline: Sequence[Answer], quantized: Sequence[Answer]) -> list[dict[str, Any]]:
    """The canary's prompts with both answers, and what is wrong with each."""
    return [
        {
            "prompt": theirs.prompt,
            "baseline": theirs.text,
            "quantized": ours.text,
            "baseline_problem": theirs.problem,
            "quantized_problem": ours.problem,
        }
        for theirs, ours in zip(baseline, quantized, strict=True)
    ]


def kl_histogram(kl: NDArray[np.float32] | None) -> dict[str, Any] | None:
    """How the KL of single tokens is distributed: counts between logarithmic edges, in nats."""
    if kl is None:
        return None
    finite = np.clip(kl[np.isfinite(kl)], _KL_EDGES[0], _KL_EDGES[-1])
    counts, _ = np.histogram(finite, _KL_EDGES)
    return {"edges": [float(f"{edge:.4g}") for edge in _KL_EDGES], "counts": counts.tolist()}


def _list(values: NDArray[np.float64] | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.7g}") for value in values]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
