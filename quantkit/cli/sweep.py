"""`quantkit sweep FILE --out DIR`: models × recipes, and one leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import api
from quantkit.cli import options
from quantkit.cli.output import Output
from quantkit.errors import EXIT_BACKEND, EXIT_CHECK


def sweep_command(
    file: Annotated[Path, typer.Argument(help="YAML with models, recipes, settings and validate.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the sweep.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in DIR; cells that are done stay.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", help="An earlier leaderboard.json; exit 4 when a cell got worse."
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", min=1, help="Cells at a time here; with RAY_ADDRESS Ray decides."),
    ] = 1,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Quantize and validate models × recipes × settings; exit 4 when a gate failed, 3 when a cell
    did."""
    from quantkit.validation.sweep.leaderboard import COLUMNS, cell_text

    ui = Output(as_json=as_json)
    try:
        report = api.sweep(
            file, out=out, resume=resume, against=against, jobs=jobs, device=device,
            progress=ui.follow,
        )  # fmt: skip
    finally:
        ui.finish()
    document = report.to_json()
    ui.table(
        "",
        [title for _, title in COLUMNS],
        [[cell_text(name, cell[name]) for name, _ in COLUMNS] for cell in document["cells"]],
    )
    for one in report.worse:
        ui.info(f"warning: {one.cell}: {one.metric} was {one.old:.4g}, is {one.new:.4g}")
    for row in report.failed:
        ui.info(f"warning: {row.key}: {row.error}")
    for note in report.notes:
        ui.info(f"note: {note}")
    ui.text(f"next: open {out / 'leaderboard.html'}")
    ui.document(document)
    if report.failed:
        raise typer.Exit(EXIT_BACKEND)
    if not report.ok:
        raise typer.Exit(EXIT_CHECK)
