"""What the functions of the API are given: changes, lists, counts, engines, in the forms that they
take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.verification import EngineRequest

Changes = Mapping[str, Any] | Iterable[str]
"""{"group_size": 64, "ignore+": ["re:.*o_proj"]}, or the texts that `--set` takes."""


def changes_of(given: Changes) -> list[str]:
    """The texts that `--set` takes."""
    from quantkit.recipe.load import as_changes

    if isinstance(given, Mapping):
        return as_changes(given)
    return [given] if isinstance(given, str) else list(given)


def listed(given: Any) -> list[Any]:
    """One value, or a sequence of them, as a list."""
    return [given] if isinstance(given, str | Path) else list(given)


def check_count(what: str, value: int | None, least: int = 1) -> None:
    """InputError where a count is less than the least that means something."""
    if value is not None and value < least:
        raise InputError(
            f"{what} {value} is less than {least}.",
            hint=f"for example {what} 8",
            code="request.count",
        )


def serve_changes(
    engine: str | Sequence[str], tp: int | str | Sequence[int], gpu: str
) -> list[str]:
    """Where the result is served, as changes of the recipe; InputError for values that are none."""
    from quantkit.engines import gpu_named

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
    """What `verify` asks of engines; None where none is named."""
    from quantkit.verification import EngineRequest

    names = _engine_names(engine)
    return EngineRequest(names, _sizes(tp), gpu or None) if names else None


def _engine_names(engine: str | Sequence[str]) -> tuple[str, ...]:
    from quantkit.engines import engine_named

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
