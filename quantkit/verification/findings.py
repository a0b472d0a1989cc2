"""What a verification found: findings with stable codes, and the report that holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from math import inf, log10
from pathlib import Path
from typing import Any, Literal

from quantkit.checkpoint.directory import TensorInfo
from quantkit.checkpoint.schemes import Scheme
from quantkit.errors import QuantkitError

SCHEMA_VERSION = 1
MOST_DB = 200.0
"""The SQNR of a weight that is exactly its source's; that of a broken one is its negative."""

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a checkpoint; an error means that it must not be served.

    `code` is stable, `where` the tensor, module or file that it is about (None: the whole).
    """

    code: str
    severity: Severity
    message: str
    hint: str
    where: str | None = None


def error(code: str, message: str, hint: str, where: str | None = None) -> Finding:
    """A finding that fails the verification."""
    return Finding(code, "error", message, hint, where)


def warning(code: str, message: str, hint: str, where: str | None = None) -> Finding:
    """A finding to look at; the checkpoint may still be right."""
    return Finding(code, "warning", message, hint, where)


def info(code: str, message: str, hint: str, where: str | None = None) -> Finding:
    """A finding that is no fault."""
    return Finding(code, "info", message, hint, where)


def from_exception(exception: QuantkitError, where: str | None = None) -> Finding:
    """The error finding that says what `exception` says."""
    return error(exception.code, exception.message, exception.hint, where)


@dataclass(frozen=True)
class PlannedLayers:
    """What the recipe asked for, by the names of the source.

    A scheme given by its name alone leaves group size and symmetry open. `folds` says whether the
    method rewrites norms and neighbouring layers (AWQ, SmoothQuant); None: as the layout implies.
    """

    quantized: Mapping[str, Scheme | str]
    kept: Collection[str]
    folds: bool | None = None


@dataclass(frozen=True)
class EngineRequest:
    """Engines that must load the checkpoint, at these tensor-parallel sizes, on this device."""

    engines: tuple[str, ...]
    sizes: tuple[int, ...] = (1,)
    gpu: str | None = None


def decibels(signal: float, noise: float) -> float:
    """10 log10 signal / noise within ±`MOST_DB`: a number for JSON whatever the sums are."""
    if noise == 0:
        return MOST_DB
    ratio = signal / noise if noise < inf else 0.0  # NaN is as bad as infinite
    return bounded_db(10 * log10(ratio)) if ratio > 0 else -MOST_DB


def bounded_db(value: float) -> float:
    """A ratio in dB, within ±`MOST_DB`."""
    return max(-MOST_DB, min(value, MOST_DB))


@dataclass(frozen=True)
class LayerFidelity:
    """How close one layer's dequantized weight is to the source: SQNR in dB (always finite), and
    its floor."""

    module: str
    scheme: str
    sqnr_db: float
    floor_db: float


@dataclass(frozen=True)
class Written:
    """What the writer's own pass measured.

    digests, source_digests: by tensor, as `Checkpoint.digest`. sqnr_db: by layer of the source.
    """

    digests: Mapping[str, str]
    source_digests: Mapping[str, str]
    sqnr_db: Mapping[str, float]

    def same(self, ours: TensorInfo, theirs: TensorInfo) -> bool:
        """Whether a kept tensor has the source's dtype, shape and bytes."""
        return self.digests[ours.name] == self.source_digests[theirs.name]


@dataclass
class VerifyReport:
    """The outcome of `verify`.

    `ledger` counts the tensors by their state (with a source: quantized, kept, folded, tied,
    added, missing, …; without: quantized, kept, added). `layers` is ordered by SQNR, the worst
    first; empty without a source.
    """

    path: Path
    format: str
    source: Path | None = None
    findings: list[Finding] = field(default_factory=list)
    ledger: Counter[str] = field(default_factory=Counter)
    layers: list[LayerFidelity] = field(default_factory=list)
    modules_quantized: int = 0
    tensors_checked: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    def codes(self, severity: Severity = "error") -> set[str]:
        """The distinct codes of one severity."""
        return {finding.code for finding in self.findings if finding.severity == severity}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "path": str(self.path),
            "source": None if self.source is None else str(self.source),
            "format": self.format,
            "findings": [asdict(finding) for finding in self.findings],
            "ledger": dict(sorted(self.ledger.items())),
            "modules_quantized": self.modules_quantized,
            "tensors_checked": self.tensors_checked,
            "layers": [asdict(layer) for layer in self.layers],
            "seconds": round(self.seconds, 3),
        }
