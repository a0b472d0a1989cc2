"""`quantkit analyze MODEL`: which groups of layers bear which scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import api
from quantkit.cli import options
from quantkit.cli.output import Output

WORST = 10


def analyze_command(
    model: options.Model,
    schemes: Annotated[
        str, typer.Option("--schemes", help="Comma-separated; w4a16:64 names a group size.")
    ] = ",".join(api.SCHEMES),
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Another text than the held-out one (.txt, .jsonl …)."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Windows of 512 tokens.")
    ] = api.WINDOWS,
    engine: Annotated[
        str, typer.Option("--engine", help="Whose fused layers are the groups: vllm or sglang.")
    ] = "vllm",
    device: options.Device = "auto",
    report: Annotated[
        list[Path], typer.Option("--report", help="Write PATH.json or .html; repeatable.")
    ] = [],  # noqa: B006
    as_json: options.Json = False,
) -> None:
    """Estimate the KL divergence that each scheme costs in each group of layers an engine fuses."""
    ui = Output(as_json=as_json)
    try:
        found = api.analyze(
            model,
            schemes=schemes,
            data=data,
            samples=samples,
            engine=engine,
            device=device,
            reports=report,
            progress=ui.follow,
        )
    finally:
        ui.finish()
    document = found.to_json()
    ui.table(
        "the whole model",
        ["scheme", "KL that adds up", "bytes saved", "groups"],
        [
            (name, f"{whole['kl']:.4g}", f"{whole['bytes_saved'] / 1e6:.1f} MB", whole["groups"])
            for name, whole in document["whole"].items()
        ],
    )
    cells = [
        (group["name"], scheme, cell)
        for group in document["groups"]
        for scheme, cell in group["schemes"].items()
    ]
    cells.sort(key=lambda one: -one[2]["kl"])
    ui.table(
        f"the {min(WORST, len(cells))} most sensitive of {len(cells)}",
        ["group", "scheme", "KL", "output error", "bytes saved"],
        [
            (name, scheme, f"{cell['kl']:.3g}", f"{cell['output_error']:.3g}",
             f"{cell['bytes_saved'] / 1e6:.2f} MB")
            for name, scheme, cell in cells[:WORST]
        ],
    )  # fmt: skip
    for note in document["notes"]:
        ui.info(f"note: {note}")
    cost = document["cost"]
    ui.text(
        f"{document['model']}: {len(document['groups'])} groups, {cost['seconds']:.1f} s, "
        f"{cost['passes']:.1f} forward passes counted (limit {cost['limit']:.1f})"
    )
    ui.document(document)
