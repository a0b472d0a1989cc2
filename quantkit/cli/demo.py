"""`quantkit demo`: the whole way on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.output import Output

QUICK = ("calibration.samples=32",)
"""Fewer samples than the default: the demo is to be read, not served."""


def demo_command(
    method: options.Method = "modelopt_fp8",
    out: options.Out = Path("demo-output"),
    sets: options.Sets = [],  # noqa: B006
    moe: Annotated[
        bool, typer.Option("--moe", help="A mixture of experts, upcycled from that model.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Fetch SmolLM2-135M, quantize it, verify it, show the result."""
    from quantkit.checkpoint.demo import demo_model
    from quantkit.checkpoint.upcycle import demo_mixture
    from quantkit.cli.quantize import show_outcome
    from quantkit.pipeline.quantize import quantize
    from quantkit.pipeline.request import Request, chosen_recipe

    ui = Output(as_json=as_json)
    recipe = chosen_recipe(method, "", "", [*QUICK, *sets])
    try:
        ui.stage("fetch and convert SmolLM2-135M-Instruct (once)")
        model = demo_model()
        if moe:
            ui.stage("make a mixture of four experts of it (once)")
            model = demo_mixture()
        ui.finish()
        ui.info(f"model: {model}")
        outcome = quantize(Request(str(model), recipe, out, overwrite=True), ui)
    finally:
        ui.finish()
    show_outcome(ui, outcome)
