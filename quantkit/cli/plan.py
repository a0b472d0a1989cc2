"""`quantkit plan MODEL --method NAME`: the preflight alone; no weights are read."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit import api
from quantkit.cli import options
from quantkit.cli.output import Output, print_error
from quantkit.errors import EXIT_INPUT

if TYPE_CHECKING:
    from quantkit.engines import Verdict
    from quantkit.pipeline.placement import Placed
    from quantkit.pipeline.plan_report import PlanReport


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
    ui = Output(as_json=as_json)
    try:
        report = api.plan(
            model,
            method=method,
            recipe=recipe,
            set=sets,
            engine=engine,
            tp=tp,
            gpu=gpu,
            measure=measure,
            trust_remote_code=trust_remote_code,
            progress=ui.follow,
        )
    finally:
        ui.finish()
    show_plan(ui, report)
    if not report.served:
        raise typer.Exit(EXIT_INPUT)


def show_plan(ui: Output, report: PlanReport) -> None:
    """The plan as a table, or as a document with every module in it."""
    source, plan, seconds = report.source, report.plan, report.seconds
    incomplete, estimate = report.incomplete, plan.estimate
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
            *(_memory(plan.placed) if plan.placed else ()),
            *([("time", f"about {seconds['total']:.0f} s, by one measured layer")]
              if seconds else []),
            *([("shapes", f"derived from {source.derived}: no weights were read")]
              if source.derived else []),
            *([("left out", f"{' and '.join(incomplete)}: their names are not derived, so they are "
                "not in the ignore list; add model.safetensors.index.json")] if incomplete else []),
            ("KV cache", plan.recipe.kv_cache),
            ("read by", plan.loads.describe()),
            *((v.title, _told(v)) for v in report.verdicts),
            *(("note", note) for note in plan.notes),
        ],
    )  # fmt: skip
    ui.document(report.to_json())
    if refusal := report.refusal:
        print_error(refusal.message, refusal.hint)
    for doubt in report.doubts:
        ui.info(f"warning: {doubt}")


def _memory(placed: Placed) -> list[tuple[str, str]]:
    """Where the weights lie and what that takes."""
    need = placed.need
    parts = [f"about {need.host / 1e9:.1f} GB of host memory"]
    if need.accelerator:
        parts.insert(0, f"about {need.accelerator / 1e9:.1f} GB of each accelerator")
    short = [placed.short] if placed.short else []
    how = "" if need.measured else " (estimated, not measured)"
    return [
        ("memory", " and ".join(parts) + how),
        ("placement", "\n".join([f"{placed.placement}: {placed.why}", *short])),
    ]


def _told(verdict: Verdict) -> str:
    """Why an engine will not load it, or whose rules say that it does, and what to know of it."""
    rules = [f"by the rules of version {verdict.version}"] if verdict.loads else []
    rules += [] if verdict.refuses or not verdict.unknown else [verdict.unknown]
    return "\n".join([*rules, *(f"{r.text} → {r.fix}" for r in verdict.reasons), *verdict.notes])
