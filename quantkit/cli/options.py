"""The flags that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.verification import EngineRequest

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
Engines = Annotated[
    str, typer.Option("--engine", help="Engines that must load it: vllm, sglang or both.")
]
TensorParallel = Annotated[str, typer.Option("--tp", help="Tensor-parallel sizes, such as 1,2,4.")]
GpuName = Annotated[str, typer.Option("--gpu", help="The device it is served on: h100, mi300x, …")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def serve_sets(engine: str, tp: str, gpu: str) -> list[str]:
    """--engine, --tp and --gpu as changes of the recipe; InputError for values that are none."""
    from quantkit.engines import gpu_named

    names = ",".join(_engine_names(engine)) if engine else ""
    sizes = ",".join(map(str, _tensor_parallel(tp))) if tp else ""
    if gpu:
        gpu_named(gpu)
    named = {"engines": names and f"[{names}]", "tp": sizes and f"[{sizes}]", "gpu": gpu}
    return [f"serve.{key}={value}" for key, value in named.items() if value]


def engine_request(engine: str, tp: str, gpu: str) -> EngineRequest | None:
    """--engine, --tp and --gpu of a command without a recipe; None without --engine."""
    from quantkit.verification import EngineRequest

    if not engine:
        return None
    return EngineRequest(_engine_names(engine), _tensor_parallel(tp), gpu or None)


def _engine_names(engine: str) -> tuple[str, ...]:
    from quantkit.engines import engine_named

    return tuple(engine_named(name.strip()).engine for name in engine.split(","))


def _tensor_parallel(tp: str) -> tuple[int, ...]:
    sizes = [size.strip() for size in tp.split(",")]
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise InputError(
            f"--tp {tp} is no list of tensor-parallel sizes.",
            hint="for example --tp 1,2,4,8",
            code="request.tp",
        )
    return tuple(map(int, sizes))
