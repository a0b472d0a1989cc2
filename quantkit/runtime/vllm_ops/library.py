"""One of vLLM's compiled operator libraries in this process, registered as `torch.ops._C`.

The libraries for CPUs and for CUDA give some operators the same names, and a second one would end
the process; so the first that is asked for is the one.
"""

from __future__ import annotations

from pathlib import Path

import torch

_loaded: list[Path] = []


def load(library: Path) -> str | None:
    """Why the operators of a library are not to be had, or None once they are registered."""
    if _loaded:
        return None if _loaded[0] == library else f"this process has loaded {_loaded[0].name}"
    if _registered():
        return "this process has imported a vLLM of its own"
    reason = load_more(library)
    if reason is None:
        _loaded.append(library)
    return reason


def load_more(library: Path) -> str | None:
    """The same of a second library of the vLLM whose first one is loaded, with other names."""
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"vLLM's operators do not load: {str(error).splitlines()[0]}"
    return None


def _registered() -> bool:
    return hasattr(torch.ops._C, "rms_norm")
