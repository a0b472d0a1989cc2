"""What quantizes. `registry/` describes the backends, `adapters/` are the worker's side of each,
`process/` runs them, `environments/` are where they run, `streaming/` is the built-in one;
`child_process.py` starts and ends their processes, and those of the engines.

This package starts with the standard library alone: adapters also run where quantkit's own
dependencies are missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.backends.registry.backend import Backend, Method, Options

__all__ = ["Backend", "Method", "Options"]


def __getattr__(name: str) -> object:
    """What a backend in a package of its own describes itself with, loaded when it is asked for."""
    if name in __all__:
        from quantkit.backends.registry import backend

        return getattr(backend, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
