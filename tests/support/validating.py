"""What the tests of validation share: requests without the slow parts, and damaged copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantkit.backends.process.job import Unit
from quantkit.validation.reports.report import Report
from quantkit.validation.run import ValidateRequest, validate
from tests.support.damage import DOWN, GATE, UP, K, V, patching, swapping

SOBER = "canary_failures<=8"
"""Three layers of the demo model loop whatever they are asked."""


class Quiet:
    """A reporter that remembers its stages and notes."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        self.stages.append(name)

    def advance(self, done: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def measured(path: Path, baseline: Path, *gates: str, **more: Any) -> Report:
    """The report of a short validation."""
    request = ValidateRequest(
        path=path,
        baseline=str(baseline),
        gates=(SOBER, *gates),
        **{"samples": 8, "throughput": False, "broken_baseline": True, **more},
    )
    return validate(request, Quiet())


def verdicts(report: Report) -> dict[str, str]:
    return {gate.metric: gate.verdict for gate in report.gates}


def damaged(source: Path, target: Path, damage: Callable[[Path], None]) -> Path:
    """A copy that was damaged and has no quantkit.json to give that away."""
    shutil.copytree(source, target)
    (target / "quantkit.json").unlink(missing_ok=True)
    damage(target)
    return target


def zero_points(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return patching(f"{DOWN}.weight_zero_point", change)


def scaled(name: str) -> Callable[[Path], None]:
    return patching(f"{DOWN}.{name}", lambda scale: scale * 1.5)


SWAPS = {"k and v": swapping(K, V), "gate and up": swapping(GATE, UP)}
