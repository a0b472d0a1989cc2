"""`quantkit export --restore FILE.pth --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import api
from quantkit.cli import options
from quantkit.cli.output import Output


def export_command(
    restore: Annotated[
        Path, typer.Option("--restore", help="A saved fake-quantized state (.pth).")
    ],
    out: options.Out,
    model: Annotated[
        str, typer.Option("--model", help="The base model, if the file does not name it.")
    ] = "",
    device: options.Device = "auto",
    python: options.Python = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Export a saved state as a checkpoint, without calibrating again."""
    from quantkit.cli.quantize import show_outcome

    ui = Output(as_json=as_json)
    try:
        outcome = api.export(
            restore,
            out=out,
            model=model,
            device=device,
            python=python,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=ui.follow,
        )
    finally:
        ui.finish()
    show_outcome(ui, outcome)
