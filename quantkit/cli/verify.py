"""`quantkit verify DIR [--source MODEL]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import api
from quantkit.cli import options
from quantkit.cli.output import Output
from quantkit.errors import EXIT_CHECK

WORST_SHOWN = 5


def verify_command(
    directory: Annotated[
        Path, typer.Argument(help="A finished checkpoint, of quantkit or anyone's.")
    ],
    source: Annotated[
        str, typer.Option("--source", help="The 16-bit model it was made from.")
    ] = "",
    engine: options.Engines = "",
    tp: options.TensorParallel = "1",
    gpu: options.GpuName = "",
    as_json: options.Json = False,
) -> None:
    """Check a checkpoint's integrity; exit 4 when there is an error."""
    ui = Output(as_json=as_json)
    try:
        report = api.verify(
            directory, source=source, engine=engine, tp=tp, gpu=gpu, progress=ui.follow
        )
    finally:
        ui.finish()
    for finding in report.findings:
        ui.text(f"{finding.severity} {finding.code}: {finding.message}")
        if finding.severity == "error":
            ui.text(f"  hint: {finding.hint}")
    measured = sorted(
        (layer for layer in report.layers if layer.sqnr_db is not None),
        key=lambda layer: layer.sqnr_db,
    )
    if measured:
        ui.table(
            "layers with the lowest weight SQNR",
            ["layer", "scheme", "dB", "floor"],
            [
                (layer.module, layer.scheme, f"{layer.sqnr_db:.1f}", f"{layer.floor_db:.0f}")
                for layer in measured[:WORST_SHOWN]
            ],
        )
    count = sum(finding.severity == "error" for finding in report.findings)
    verdict = "no errors" if report.ok else f"{count} error{'s' if count > 1 else ''}"
    ui.text(f"{directory}: {report.format}, {report.tensors_checked} tensors checked, {verdict}")
    ui.document(report.to_json())
    if not report.ok:
        raise typer.Exit(EXIT_CHECK)
