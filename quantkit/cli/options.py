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
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, cuda:0,1, npu:N.")]
AsOn = Annotated[
    str,
    typer.Option(
        "--as-on",
        help="Round activations where the engine does on this GPU (h100, b200, …); default: as it "
        "does on the one here, on a CPU as the checkpoint says.",
    ),
]
Python = Annotated[str | None, typer.Option("--python", help="The backend's interpreter.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DIR once the new checkpoint verified.")
]
Engines = Annotated[
    str, typer.Option("--engine", help="Engines that must load it: vllm, sglang or both.")
]
TensorParallel = Annotated[str, typer.Option("--tp", help="Tensor-parallel sizes, such as 1,2,4.")]
GpuName = Annotated[str, typer.Option("--gpu", help="The device it is served on: h100, mi300x, …")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
