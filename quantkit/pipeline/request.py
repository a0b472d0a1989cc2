"""What a run is asked to do, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit.pipeline.plan import Plan
from quantkit.recipe.model import Recipe
from quantkit.verification import VerifyReport


@dataclass(frozen=True)
class Request:
    """One `quantkit quantize`: `model` is a directory or a Hub name; paths are the user's.

    `resume`, `memory` (bytes), `jobs` (worker processes) and `executor` are for the streaming
    backend.
    """

    model: str
    recipe: Recipe
    out: Path
    checkpoint_save: Path | None = None
    device: str = "auto"
    python: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    memory: int | None = None
    jobs: int | None = None
    executor: Literal["local", "ray"] = "local"


@dataclass(frozen=True)
class ExportRequest:
    """One `quantkit export`: `model` may be empty when the state file remembers its base."""

    restore: Path
    out: Path
    model: str = ""
    device: str = "auto"
    python: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind: `provenance` is the content of quantkit.json."""

    out: Path
    plan: Plan
    report: VerifyReport
    provenance: dict[str, Any]
