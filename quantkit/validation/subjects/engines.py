"""The engines that can hold a model under test, by the name of `--engine`."""

from __future__ import annotations

from pathlib import Path

from quantkit.backends.environments.managed import spec_named
from quantkit.errors import InputError
from quantkit.runtime.serving.environments import ENGINES as SERVED
from quantkit.runtime.serving.environments import find_interpreter
from quantkit.validation.subjects.base import Opener, Opening
from quantkit.validation.subjects.builtin import (
    computing,
    has_vllm_operators,
    open_builtin,
    refuse_builtin,
)
from quantkit.validation.subjects.served import OPENERS, refuse_served

ENGINES: dict[str, Opener] = {"builtin": open_builtin, **OPENERS}


def opener(name: str) -> Opener:
    """How an engine opens a checkpoint; InputError for a name that is none."""
    if name not in ENGINES:
        raise InputError(
            f"There is no engine {name!r}.",
            hint=f"--engine {', '.join(ENGINES)}",
            code="validate.engine",
        )
    return ENGINES[name]


def refuse_unopenable(name: str, path: Path, opening: Opening) -> None:
    """Raise now what opening a checkpoint would raise after its baseline was measured: a kernel
    that cannot run, a network that is not computed, an engine that is not there."""
    if name in SERVED:
        refuse_served(SERVED[name], path, opening)
    else:
        refuse_builtin(path, opening)


def engine_build(name: str) -> str:
    """What pins the numbers of an engine, without starting it: the environment that holds it, whose
    name changes with every pin (for the builtin one: its CPU operators', and how this CPU
    multiplies); "" where there is none.

    Raises BackendError when that environment is not made or cannot be used here.
    """
    engine = SERVED.get(name)
    if name == "builtin":
        operators = spec_named("vllm").path.name if has_vllm_operators() else ""
        return f"{operators} {computing()}".strip()
    if engine is None or not engine.environments:
        return ""
    return find_interpreter(engine).parents[1].name
