"""`quantkit plan MODEL --method NAME`: the preflight alone; no weights are read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.cli import options
from quantkit.cli.output import Output
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.checkpoint import Checkpoint
    from quantkit.plan import Plan
    from quantkit.recipe import Recipe


def plan_command(
    model: options.Model,
    method: options.Method = "",
    recipe: options.RecipeFile = "",
    sets: options.Sets = [],  # noqa: B006
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Say what would be done to every layer, what it would cost, or why it cannot be done."""
    from quantkit.pipeline import preflight
    from quantkit.request import Request

    request = Request(
        model=model,
        recipe=chosen_recipe(method, recipe, "", sets),
        out=Path("unused"),
        trust_remote_code=trust_remote_code,
    )
    show_plan(Output(as_json=as_json), *preflight(request))


def chosen_recipe(method: str, recipe: str, calibration: str, sets: list[str]) -> Recipe:
    """The recipe that the flags name; exactly one of method and recipe."""
    from quantkit.recipe import load_recipe

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
    changes = [*sets, *([f"calibration.name={calibration}"] if calibration else [])]
    return load_recipe(method or recipe, tuple(changes))


def show_plan(ui: Output, source: Checkpoint, plan: Plan) -> None:
    """The plan as a table, or as a document with every module in it."""
    from quantkit.engines import support

    estimate = plan.estimate
    loads = support(plan.method.layout, plan.method.algorithm, plan.recipe.scheme)
    quantized = Counter(scheme.name for scheme in plan.layers.values())
    kept = Counter(plan.kept.values())
    ui.table(
        "",
        ["", f"{plan.recipe.name} on {source.path.name}"],
        [
            *((f"→ {name}", f"{count} layers") for name, count in quantized.items()),
            *(("kept", f"{count}: {why}") for why, count in kept.items()),
            ("bits a weight", f"{plan.bits_per_weight:.2f} in quantized layers"),
            ("size", f"{estimate.source / 1e6:.0f} MB → {estimate.output / 1e6:.0f} MB"),
            ("memory", f"about {estimate.memory / 1e9:.1f} GB"),
            ("KV cache", plan.recipe.kv_cache),
            ("loads in", loads.describe()),
            *(("note", note) for note in plan.notes),
        ],
    )
    ui.document(
        {
            "schema_version": 1,
            "method": plan.recipe.name,
            "recipe": plan.recipe.model_dump(mode="json"),
            "layers": {name: scheme.name for name, scheme in plan.layers.items()},
            "kept": dict(plan.kept),
            "ignore": sorted(plan.kept),
            "engines": list(loads.engines),
            "export_only": loads.export_only,
            "bits_per_weight": plan.bits_per_weight,
            "estimate": vars(estimate),
            "notes": list(plan.notes),
        }
    )
