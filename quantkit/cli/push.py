"""`quantkit push DIR REPO`: to the Hub, only what is proven."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import api
from quantkit.cli import options
from quantkit.cli.output import Output


def push_command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that quantkit made.")],
    repo: Annotated[str, typer.Argument(help="ORGANISATION/NAME on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; default: private.")
    ] = False,
    force: Annotated[
        str,
        typer.Option("--force", help="Why it is sent though it is not proven; the card says so."),
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Send a checkpoint to the Hugging Face Hub that verifies and whose gates held; exit 4 for any
    other."""
    ui = Output(as_json=as_json)
    try:
        done = api.push(directory, repo, public=public, force=force, progress=ui.follow)
    finally:
        ui.finish()
    for fault in done.forced:
        ui.info(f"warning: pushed though {fault}")
    ui.text(f"{done.url} ({'private' if done.private else 'public'}): {len(done.files)} files, "
            f"commit {done.commit[:12]}")  # fmt: skip
    ui.document(done.to_json())
