"""`quantkit quantize MODEL --method NAME --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit import api
from quantkit.cli import options
from quantkit.cli.output import Output
from quantkit.errors import command

if TYPE_CHECKING:
    from quantkit.pipeline.request import Outcome

EXPERT_ROWS = 8
"""Layers of a mixture whose experts' calibration is shown."""


def quantize_command(
    model: options.Model,
    out: options.Out,
    method: options.Method = "",
    recipe: options.RecipeFile = "",
    calibration: Annotated[
        str, typer.Option("--calibration", help="A mixture's name or a data file.")
    ] = "",
    sets: options.Sets = [],  # noqa: B006
    engine: options.Engines = "",
    gpu: options.GpuName = "",
    checkpoint_save: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint-save", help="Also keep the fake-quantized state in this .pth file."
        ),
    ] = None,
    device: options.Device = "auto",
    python: options.Python = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where a stopped run of the same command left off."),
    ] = False,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            help="Most memory of an rtn_* run, such as 2GB; without it and --jobs: a few hundred "
            "MB and the largest tensor.",
        ),
    ] = "",
    jobs: Annotated[int | None, typer.Option("--jobs", help="Workers of an rtn_* run.")] = None,
    executor: Annotated[
        str,
        typer.Option("--executor", help="Where the work is done: local, or ray (a cluster)."),
    ] = "local",
    push: Annotated[
        str,
        typer.Option("--push", help="Validate the result, then push it to this repository."),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only; write nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a model into a Hugging Face checkpoint that is verified before it appears."""
    ui = Output(as_json=as_json)
    if dry_run:
        from quantkit.cli.plan import show_plan
        from quantkit.pipeline.publish import check_apart, check_target
        from quantkit.pipeline.request import executor_named
        from quantkit.recipe.units import parse_bytes

        executor_named(executor)
        if memory:
            parse_bytes("--memory", memory)
        show_plan(
            ui,
            api.plan(
                model,
                method=method,
                recipe=recipe,
                set=sets,
                calibration=calibration,
                engine=engine,
                gpu=gpu,
                strict=True,
                device=device,
                checkpoint_save=checkpoint_save,
                trust_remote_code=trust_remote_code,
            ),
        )
        check_apart(out, Path(model))
        check_target(out, overwrite=overwrite)
        return
    try:
        outcome = api.quantize(
            model,
            method=method,
            recipe=recipe,
            out=out,
            set=sets,
            calibration=calibration,
            engine=engine,
            gpu=gpu,
            device=device,
            checkpoint_save=checkpoint_save,
            python=python,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            resume=resume,
            memory=memory or None,
            jobs=jobs,
            executor=executor,
            push=push,
            progress=ui.follow,
        )
    finally:
        ui.finish()
    show_outcome(ui, outcome)


def show_outcome(ui: Output, outcome: Outcome) -> None:
    """The table of a finished run, and what to type next."""
    from quantkit.engines import SILENT_GARBAGE

    plan, results = outcome.plan, outcome.provenance.results
    sqnr = results.weight_sqnr_db
    rows = [
        ("checkpoint", outcome.out),
        ("method", f"{plan.recipe.name} ({plan.backend.distribution}, {plan.method.algorithm})"),
        ("weights", f"{results.source_bytes / 1e6:.0f} MB → {results.weight_bytes / 1e6:.0f} "
                    f"MB, {results.bits_per_weight:.2f} bits a weight in quantized layers"),
        ("layers", f"{len(plan.layers)} quantized, {len(plan.kept)} kept in 16 bit"),
        ("calibration", _calibration_line(outcome)),
        ("weight SQNR", f"mean {sqnr.mean} dB, worst {sqnr.min} dB in {sqnr.worst_layer}"
                        if sqnr else "not measured"),
        ("verified", f"{outcome.report.tensors_checked} tensors, no errors"),
        ("time", _times(outcome)),
        ("loads in", plan.loads.describe()),
    ]  # fmt: skip
    ui.table("", ["", "result"], rows)
    _show_experts(ui, outcome)
    if plan.method.layout in SILENT_GARBAGE:
        ui.info(f"warning: {SILENT_GARBAGE[plan.method.layout]}")
    for finding in outcome.report.findings:
        if finding.severity == "warning":
            ui.info(f"warning: {finding.message}")
    told = {finding.message for finding in outcome.report.findings if finding.severity == "warning"}
    for note in plan.notes:
        if note not in told:
            ui.info(f"note: {note}")
    ui.text(f"next: {command('verify', outcome.out)}")
    ui.document(outcome.to_json())


def _show_experts(ui: Output, outcome: Outcome) -> None:
    """Calibration tokens of the experts, the layers with the fewest first."""
    experts = outcome.provenance.experts
    if experts is None:
        return
    from statistics import median

    routes = {block: experts.routed.get(block, []) for block in experts.seen}
    blocks = sorted(routes, key=lambda block: (min(experts.seen[block]), min(routes[block] or [0])))
    rows = []
    for block in blocks[:EXPERT_ROWS]:
        seen, routed = experts.seen[block], routes[block]
        under = sum(count < experts.floor for count in seen)
        rows.append((block, len(seen), f"{min(seen)} / {median(seen):g}",
                     f"{min(routed)} / {median(routed):g}" if routed else "–", under))  # fmt: skip
    left = len(blocks) - len(rows)
    more = f"; {left} more layers saw no less" if left else ""
    ui.table(
        f"calibration tokens of each expert (experts: {experts.calibrated}){more}",
        ["experts of", "count", "seen min / median", "routed min / median", "under the floor"],
        rows,
    )
    if experts.under_floor:
        ui.info(
            f"note: {len(experts.under_floor)} experts saw fewer than {experts.floor} calibration "
            f"tokens; on_unseen={experts.decided}"
        )


def _times(outcome: Outcome) -> str:
    stages = outcome.provenance.stages
    return ", ".join(f"{stage.name} {stage.seconds:.1f} s" for stage in stages)


def _calibration_line(outcome: Outcome) -> str:
    calibration = outcome.provenance.calibration
    if not calibration:
        return "none needed"
    if not calibration.digest:
        return "unknown (the state was made elsewhere)"
    return (
        f"{calibration.name}: {calibration.samples} samples, "
        f"{calibration.tokens} tokens, digest {calibration.digest[:12]}"
    )
