"""vLLM's compiled CUDA operators (CUTLASS, Marlin), without importing vLLM.

They come from the managed environment `vllm-cuda`, from a vLLM beside this quantkit, or from the
library that a variable names. The library keeps to torch's stable ABI.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from quantkit.environments.managed import ready
from quantkit.runtime import vllm_library

LIBRARY = "_C_stable_libtorch.abi3.so"
CREATE = "quantkit env create vllm-cuda"
SWITCH = "QUANTKIT_VLLM_CUDA_OPERATORS"
"""`off`, or the path of the library to take."""


@cache
def missing() -> str | None:
    """Why vLLM's CUDA operators are not to be had, or None once they are loaded."""
    named = os.environ.get(SWITCH)
    if named == "off":
        return f"{SWITCH} is off"
    library = Path(named) if named else _installed()
    if library is None:
        return f"needs vLLM's CUDA operators: {CREATE}"
    if not library.is_file():
        return f"there is no {library}"
    return vllm_library.load(library)


def _installed() -> Path | None:
    python = ready("vllm-cuda")
    folders = list(python.parent.parent.glob("lib/python*/site-packages/vllm")) if python else []
    beside = find_spec("vllm")
    folders += [Path(folder) for folder in (beside and beside.submodule_search_locations) or []]
    return next((folder / LIBRARY for folder in folders if (folder / LIBRARY).is_file()), None)
