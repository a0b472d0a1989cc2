"""`quantkit quantize MODEL --method NAME --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quantkit.cli import options
from quantkit.cli.output import Output
from quantkit.errors import InputError, command
from quantkit.recipe.units import parse_bytes

if TYPE_CHECKING:
    from quantkit.pipeline.request import Outcome


def quantize_command(
    model: options.Model,
    out: options.Out,
    method: options.Method = "",
    recipe: options.RecipeFile = "",
    calibration: Annotated[
        str, typer.Option("--calibration", help="A mixture's name or a data file.")
    ] = "",
    sets: options.Sets = [],  # noqa: B006
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
        bool, typer.Option("--resume", help="Go on where a stopped rtn_* run left off.")
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
        str, typer.Option("--executor", help="Where an rtn_* run works: local or ray.")
    ] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only; write nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a model into a Hugging Face checkpoint that is verified before it appears."""
    from quantkit.cli.plan import chosen_recipe, show_plan
    from quantkit.pipeline.quantize import preflight, quantize
    from quantkit.pipeline.request import Request

    ui = Output(as_json=as_json)
    request = Request(
        model=model,
        recipe=chosen_recipe(method, recipe, calibration, sets),
        out=out,
        checkpoint_save=checkpoint_save,
        device=device,
        python=python,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        resume=resume,
        memory=parse_bytes("--memory", memory) if memory else None,
        jobs=jobs,
        executor=_executor(executor),
    )
    if dry_run:
        show_plan(ui, *preflight(request))
        return
    try:
        outcome = quantize(request, ui)
    finally:
        ui.finish()
    show_outcome(ui, outcome)


def _executor(name: str) -> Literal["local", "ray"]:
    if name == "local":
        return "local"
    if name == "ray":
        return "ray"
    raise InputError(
        f"--executor {name} does not exist.",
        hint="--executor local, or --executor ray",
        code="request.executor",
    )


def show_outcome(ui: Output, outcome: Outcome) -> None:
    """The table of a finished run, and what to type next."""
    from quantkit.engines import SILENT_GARBAGE

    plan, results = outcome.plan, outcome.provenance["results"]
    sqnr = results.get("weight_sqnr_db", {})
    rows = [
        ("checkpoint", outcome.out),
        ("method", f"{plan.recipe.name} ({plan.backend.distribution}, {plan.method.algorithm})"),
        ("weights", f"{results['source_bytes'] / 1e6:.0f} MB → {results['weight_bytes'] / 1e6:.0f} "
                    f"MB, {results['bits_per_weight']:.2f} bits a weight in quantized layers"),
        ("layers", f"{len(plan.layers)} quantized, {len(plan.kept)} kept in 16 bit"),
        ("calibration", _calibration_line(outcome)),
        ("weight SQNR", f"mean {sqnr['mean']} dB, worst {sqnr['min']} dB in {sqnr['worst_layer']}"
                        if sqnr else "not measured"),
        ("verified", f"{outcome.report.tensors_checked} tensors, no errors"),
        ("time", _times(outcome)),
        ("loads in", plan.loads.describe()),
    ]  # fmt: skip
    ui.table("", ["", "result"], rows)
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
    ui.document(
        {
            "schema_version": 1,
            "out": str(outcome.out),
            "quantkit": outcome.provenance,
            "verify": outcome.report.to_json(),
        }
    )


def _times(outcome: Outcome) -> str:
    stages = outcome.provenance["stages"]
    return ", ".join(f"{stage['name']} {stage['seconds']:.1f} s" for stage in stages)


def _calibration_line(outcome: Outcome) -> str:
    calibration = outcome.provenance["calibration"]
    if not calibration:
        return "none needed"
    if not calibration.get("digest"):
        return "unknown (the state was made elsewhere)"
    return (
        f"{calibration['name']}: {calibration['samples']} samples, "
        f"{calibration['tokens']} tokens, digest {calibration['digest'][:12]}"
    )
