"""`quantkit plan MODEL --method NAME`: the preflight alone; no weights are read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options
from quantkit.cli.output import Output, print_error
from quantkit.errors import EXIT_INPUT, InputError

if TYPE_CHECKING:
    from quantkit.checkpoint.directory import Checkpoint
    from quantkit.engines import Verdict
    from quantkit.pipeline.plan import Plan
    from quantkit.recipe.model import Recipe, Serve


def plan_command(
    model: options.Model,
    method: options.Method = "",
    recipe: options.RecipeFile = "",
    sets: options.Sets = [],  # noqa: B006
    engine: options.Engines = "",
    tp: options.TensorParallel = "",
    gpu: options.GpuName = "",
    measure: Annotated[
        bool, typer.Option("--measure", help="Time one layer for real, and estimate the whole.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Say what would be done to every layer, what it costs, and which engine will load it.

    Exit 1 when an engine that was asked for will not, or none will at a size or GPU asked for.
    """
    from quantkit.pipeline.quantize import plan_only
    from quantkit.pipeline.request import Request

    asked = options.serve_sets(engine, tp, gpu)
    request = Request(
        model=model,
        recipe=chosen_recipe(method, recipe, "", [*sets, *asked]),
        out=Path("unused"),
        trust_remote_code=trust_remote_code,
    )
    ui = Output(as_json=as_json)
    source, plan = plan_only(request)
    seconds = None
    if measure:
        from quantkit.pipeline.trial import measured_seconds

        seconds = measured_seconds(request, source, plan, ui)
    if not show_plan(ui, source, plan, seconds):
        raise typer.Exit(EXIT_INPUT)


def chosen_recipe(method: str, recipe: str, calibration: str, sets: list[str]) -> Recipe:
    """The recipe that the flags name; exactly one of method and recipe."""
    from quantkit.backends.registry import load_recipe

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


def show_plan(
    ui: Output, source: Checkpoint, plan: Plan, seconds: dict[str, float] | None = None
) -> bool:
    """The plan as a table, or as a document with every module in it; whether it will be served as
    the recipe asks."""
    from quantkit.checkpoint.network.tensor_names import left_out
    from quantkit.pipeline.engine_view import engine_refusal, ignore_list, verdicts

    estimate = plan.estimate
    incomplete = left_out(source.config) if source.derived == "config.json" else []
    found = verdicts(source, plan)
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
            *([("time", f"about {seconds['total']:.0f} s, by one measured layer")]
              if seconds else []),
            *([("shapes", f"derived from {source.derived}: no weights were read")]
              if source.derived else []),
            *([("left out", f"{' and '.join(incomplete)}: their names are not derived, so they are "
                "not in the ignore list; add model.safetensors.index.json")] if incomplete else []),
            ("KV cache", plan.recipe.kv_cache),
            ("read by", plan.loads.describe()),
            *((v.title, _told(v)) for v in found),
            *(("note", note) for note in plan.notes),
        ],
    )  # fmt: skip
    ui.document(
        {
            "schema_version": 1,
            "method": plan.recipe.name,
            "recipe": plan.recipe.model_dump(mode="json"),
            "layers": {name: scheme.name for name, scheme in plan.layers.items()},
            "kept": dict(plan.kept),
            "ignore": ignore_list(source, plan.kept),
            "engines": list(plan.loads.engines),
            "export_only": plan.loads.export_only,
            "verdicts": [verdict.to_json() for verdict in found],
            "bits_per_weight": plan.bits_per_weight,
            "estimate": {**vars(estimate), **({"seconds": seconds} if seconds else {})},
            "derived": source.derived,
            "incomplete": incomplete,
            "notes": list(plan.notes),
        }
    )
    if refusal := engine_refusal(source, plan, found):
        print_error(refusal.message, refusal.hint)
        return False
    return _served(plan.recipe.serve, found)


def _told(verdict: Verdict) -> str:
    """Why an engine will not load it, or whose rules say that it does, and what to know of it."""
    rules = [] if verdict.reasons else [f"by the rules of version {verdict.version}"]
    return "\n".join([*rules, *(f"{r.text} → {r.fix}" for r in verdict.reasons), *verdict.notes])


def _served(serve: Serve, found: list[Verdict]) -> bool:
    """With sizes or a GPU but no engine asked for: whether at every size one loads it."""
    if serve.engines or (not serve.gpu and list(serve.tp) == [1]):
        return True
    return all(any(v.loads for v in found if v.tp == size) for size in serve.tp)
