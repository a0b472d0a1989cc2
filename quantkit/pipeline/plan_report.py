"""A plan with what the engines say to its result: what `quantkit plan` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.tensor_names import left_out
from quantkit.engines import Verdict
from quantkit.errors import InputError
from quantkit.pipeline.engine_view import engine_refusal, ignore_list, verdicts
from quantkit.pipeline.plan import Plan

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlanReport:
    """What would be done to every layer of `source`, what it costs, and which engine loads it.

    verdicts: of every engine that the recipe asks for, or of all known ones, a size each.
    incomplete: parts of the model whose names could not be derived without its weights.
    seconds: `once`, `per_layer` and `total` of a measured trial, where one was asked for.
    """

    source: Checkpoint
    plan: Plan
    verdicts: tuple[Verdict, ...]
    incomplete: tuple[str, ...]
    seconds: dict[str, float] | None = None

    @property
    def refusal(self) -> InputError | None:
        """Why an engine that the recipe asks for will not load the result; None where none
        refuses."""
        return engine_refusal(self.source, self.plan, self.verdicts)

    @property
    def doubts(self) -> list[str]:
        """What is unknown of engines that the recipe asks for."""
        if not self.plan.recipe.serve.engines:
            return []
        return [f"{v.title}: {v.unknown}" for v in self.verdicts if v.outcome == "unknown"]

    @property
    def served(self) -> bool:
        """Whether nothing refuses what the recipe asks for: no engine that it names, or, with sizes
        or a GPU but no engine, at every size not all of them. What is unknown refuses nothing."""
        serve = self.plan.recipe.serve
        if serve.engines:
            return self.refusal is None
        if not serve.gpu and list(serve.tp) == [1]:
            return True
        return all(any(not v.refuses for v in self.verdicts if v.tp == size) for size in serve.tp)

    def to_json(self) -> dict[str, Any]:
        """The document of `quantkit plan --json`: plain JSON values, every module in it."""
        plan, seconds = self.plan, {"seconds": self.seconds} if self.seconds else {}
        return {
            "schema_version": SCHEMA_VERSION,
            "method": plan.recipe.name,
            "recipe": plan.recipe.model_dump(mode="json"),
            "layers": {name: scheme.name for name, scheme in plan.layers.items()},
            "kept": dict(plan.kept),
            "ignore": ignore_list(self.source, plan.kept),
            "engines": list(plan.loads.engines),
            "export_only": plan.loads.export_only,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "bits_per_weight": plan.bits_per_weight,
            "estimate": {**vars(plan.estimate), **seconds},
            "placement": plan.placed.to_json() if plan.placed else None,
            "derived": self.source.derived,
            "incomplete": list(self.incomplete),
            "notes": list(plan.notes),
        }


def report_of(
    source: Checkpoint, plan: Plan, seconds: dict[str, float] | None = None
) -> PlanReport:
    """The plan judged by the rules of the engines."""
    incomplete = left_out(source.config) if source.derived == "config.json" else ()
    return PlanReport(source, plan, tuple(verdicts(source, plan)), tuple(incomplete), seconds)
