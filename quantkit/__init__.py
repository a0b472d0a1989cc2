"""quantkit: quantize large language models offline, prove the result, ship it.

    import quantkit

    outcome = quantkit.quantize("MODEL", method="rtn_w4a16", out="DIR")

`quantize`, `plan`, `export`, `verify`, `validate`, `analyze`, `sweep`, `push` and `load` do
what the commands do (`quantkit/api/`); their failures are the exceptions of `quantkit.errors`.

Importing this package loads the standard library only, the rest comes with the first use: the
worker (`quantkit/backends/process/worker.py`) also starts in environments in which quantkit's own
dependencies are missing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit import errors
    from quantkit.api import (
        ProgressEvent,
        analyze,
        export,
        load,
        plan,
        push,
        quantize,
        sweep,
        validate,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "ProgressEvent", "analyze", "errors", "export", "load", "plan", "push", "quantize",
    "sweep", "validate", "verify",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import what `__all__` names when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    from importlib import import_module

    if name == "errors":
        return import_module("quantkit.errors")
    value = globals()[name] = getattr(import_module("quantkit.api"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
