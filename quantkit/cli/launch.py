"""`quantkit launch DIR --engine vllm|sglang`: the serving command of a checkpoint."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.output import Output


def launch_command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint, of quantkit or anyone's.")],
    engine: Annotated[str, typer.Option("--engine", help="vllm or sglang.")],
    tp: Annotated[int, typer.Option("--tp", help="Devices for tensor parallelism.")] = 1,
    gpu: Annotated[
        str, typer.Option("--gpu", help="What it is served on (h100, …); default: the GPU here.")
    ] = "",
    online: Annotated[
        str,
        typer.Option("--online", help="Quantize a 16-bit model while it loads: fp8, mxfp8 …"),
    ] = "",
    execute: Annotated[
        bool, typer.Option("--exec", help="Become the server instead of printing the command.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Print the exact command that serves a checkpoint, or run it."""
    from quantkit.engines import gpu_named
    from quantkit.engines.gpus import gpu_here
    from quantkit.runtime.serving.launch import executable, launch

    out = Output(as_json=as_json)
    made = launch(directory, engine, tp, gpu_named(gpu) if gpu else gpu_here(), online)
    variables = [f"{name}={shlex.quote(value)}" for name, value in made.environment.items()]
    command = " ".join([*variables, shlex.join(made.argv)])
    for note in made.notes:
        out.info(f"note: {note}")
    if execute:
        program = executable(made)
        out.info(command)
        wanted = os.environ | made.environment
        os.execve(program, [program, *made.argv[1:]], wanted)  # noqa: S606
    out.text(command)
    out.info(f"for {engine} {made.minimum_version} or newer")
    out.document({"schema_version": 1, "command": command, **asdict(made)})
