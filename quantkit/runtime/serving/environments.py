"""The engines, and the interpreter that runs each. Nothing is installed implicitly."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from quantkit.backends.environments.managed import ready, spec_named, unavailable
from quantkit.engines import NAMES
from quantkit.errors import BackendError


@dataclass(frozen=True)
class EngineProcessSpec:
    """One serving engine, described.

    driver: `"module:attr"` of its driver. environments: the managed environments that hold it, the
    first that this machine can use is its own; none for an engine of quantkit's environment.
    harness: `"module:attr"` of what runs lm-eval's backend for it, "" where there is none.
    """

    name: str
    driver: str
    environments: tuple[str, ...] = ()
    harness: str = ""

    @property
    def title(self) -> str:
        """How its makers write it."""
        return NAMES[self.name]


_DRIVERS = "quantkit.runtime.serving.drivers"
ENGINES = {
    engine.name: engine
    for engine in (
        EngineProcessSpec(
            "vllm",
            f"{_DRIVERS}.vllm:Vllm",
            ("vllm-cuda", "vllm"),
            f"{_DRIVERS}.harness:VllmHarness",
        ),
        EngineProcessSpec(
            "sglang", f"{_DRIVERS}.sglang:Sglang", ("sglang",), f"{_DRIVERS}.harness:SglangHarness"
        ),
        EngineProcessSpec("transformers", f"{_DRIVERS}.transformers:Transformers"),
    )
}


def find_interpreter(engine: EngineProcessSpec) -> Path:
    """The interpreter of the engine's managed environment, or the current one.

    Raises BackendError with the command that makes the environment, or with the reason why none
    can work on this machine.
    """
    if not engine.environments:
        return Path(sys.executable)
    specs = [spec_named(name) for name in engine.environments]
    reasons = {spec.name: unavailable(spec) for spec in specs}
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        why = "; ".join(f"environment {name}: {reason}" for name, reason in reasons.items())
        raise BackendError(
            f"{engine.title} cannot run on this machine ({why}).",
            hint="validate with --engine vllm or builtin here, or with this one beside a GPU",
            code="engine.unavailable",
        )
    python = ready(usable[0])
    if python is None:
        raise BackendError(
            f"{engine.title} runs in the environment {usable[0]}, which is not made yet.",
            hint=f"quantkit env create {usable[0]}",
            code="engine.no_environment",
        )
    return python
