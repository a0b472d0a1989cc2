"""The flags that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face directory or a Hub name.")]
Method = Annotated[str, typer.Option("--method", "-m", help="A method name: quantkit methods.")]
RecipeFile = Annotated[str, typer.Option("--recipe", help="A recipe file instead of a method.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The new checkpoint's directory.")]
Sets = Annotated[
    list[str],
    typer.Option("--set", help="KEY.PATH=VALUE in the recipe, or KEY+=VALUE; repeatable."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, npu:N.")]
Python = Annotated[str | None, typer.Option("--python", help="The backend's interpreter.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DIR once the new checkpoint verified.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
