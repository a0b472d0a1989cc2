"""What a run is asked to do, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.provenance import Provenance
from quantkit.errors import InputError
from quantkit.pipeline.plan import Plan
from quantkit.recipe.model import Recipe
from quantkit.verification import VerifyReport

Executor = Literal["local", "ray"]
"""Where shards (built-in) or the whole job (a library) work: here, or on a Ray cluster."""


@dataclass(frozen=True)
class Request:
    """One `quantkit quantize`: `model` is a directory or a Hub name; paths are the user's.

    `resume` goes on with a run that was stopped; `memory` (bytes) and `jobs` (worker processes)
    are for the streaming backend.
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
    executor: Executor = "local"


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
    provenance: Provenance

    def to_json(self) -> dict[str, Any]:
        """The document of `quantkit quantize --json`: plain JSON values."""
        return {
            "schema_version": 1,
            "out": str(self.out),
            "quantkit": self.provenance.to_json(),
            "verify": self.report.to_json(),
        }


def chosen_recipe(method: str, recipe: str, calibration: str, changes: Sequence[str]) -> Recipe:
    """The recipe that a method's name or a file gives, exactly one of them, with its changes."""
    if bool(method) == bool(recipe):
        raise InputError(
            "Give either --method NAME or --recipe FILE"
            + (f", not both ({method}, {recipe})." if method else "."),
            hint="quantkit methods",
            code="request.method",
        )
    if recipe and not Path(recipe).is_file():
        raise InputError(
            f"The recipe file {recipe} does not exist.",
            hint="quantkit recipes list",
            code="recipe.missing",
        )
    asked = [f"calibration.name={calibration}"] if calibration else []
    return load_recipe(method or recipe, (*changes, *asked))


def executor_named(name: str) -> Executor:
    """The executor of that name; InputError with the known ones otherwise."""
    for known in get_args(Executor):
        if name == known:
            executor: Executor = known
            return executor
    raise InputError(
        f"--executor {name} does not exist.",
        hint="--executor local, or --executor ray",
        code="request.executor",
    )
