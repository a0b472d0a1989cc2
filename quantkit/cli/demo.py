"""`quantkit demo`: the whole way on a small real model."""

from __future__ import annotations

from pathlib import Path

from quantkit.cli import options
from quantkit.cli.output import Output

QUICK = ("calibration.samples=32",)
"""Fewer samples than the default: the demo is to be read, not served."""


def demo_command(
    method: options.Method = "modelopt_fp8",
    out: options.Out = Path("demo-output"),
    sets: options.Sets = [],  # noqa: B006
    as_json: options.Json = False,
) -> None:
    """Fetch SmolLM2-135M, quantize it, verify it, show the result."""
    from quantkit.checkpoint.demo import demo_model
    from quantkit.cli.quantize import show_outcome
    from quantkit.pipeline.quantize import quantize
    from quantkit.pipeline.request import Request, chosen_recipe

    ui = Output(as_json=as_json)
    recipe = chosen_recipe(method, "", "", [*QUICK, *sets])
    try:
        ui.stage("fetch and convert SmolLM2-135M-Instruct (once)")
        model = demo_model()
        ui.finish()
        ui.info(f"model: {model}")
        outcome = quantize(Request(str(model), recipe, out, overwrite=True), ui)
    finally:
        ui.finish()
    show_outcome(ui, outcome)
