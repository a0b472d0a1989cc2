"""Where a result is to be served, as the API and the command line are told: engines, sizes, GPU."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.engines import engine_named, gpu_named
from quantkit.errors import InputError
from quantkit.verification import EngineRequest


def serve_changes(
    engine: str | Sequence[str], tp: int | str | Sequence[int], gpu: str
) -> list[str]:
    """Where the result is served, as changes of the recipe; InputError for values that are none."""
    names, sizes = _engine_names(engine), _sizes(tp)
    if gpu:
        gpu_named(gpu)
    named = {
        "engines": f"[{','.join(names)}]" if names else "",
        "tp": f"[{','.join(map(str, sizes))}]" if sizes else "",
        "gpu": gpu,
    }
    return [f"serve.{key}={value}" for key, value in named.items() if value]


def engine_request(
    engine: str | Sequence[str], tp: int | str | Sequence[int], gpu: str
) -> EngineRequest | None:
    """The same for `verify`; None where no engine is named."""
    names = _engine_names(engine)
    return EngineRequest(names, _sizes(tp), gpu or None) if names else None


def _engine_names(engine: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(engine, str):
        engine = engine.split(",") if engine else ()
    return tuple(engine_named(name.strip()).engine for name in engine)


def _sizes(tp: int | str | Sequence[int]) -> tuple[int, ...]:
    """Tensor-parallel sizes: a number, numbers, or the text of `--tp` such as "1,2,4"."""
    if isinstance(tp, str):
        tp = tp.split(",") if tp else ()  # type: ignore[assignment]
    sizes = [str(size).strip() for size in ([tp] if isinstance(tp, int) else tp)]
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise InputError(
            f"--tp {','.join(sizes)} is no list of tensor-parallel sizes.",
            hint="for example --tp 1,2,4,8",
            code="request.tp",
        )
    return tuple(map(int, sizes))
