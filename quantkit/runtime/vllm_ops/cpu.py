"""vLLM's compiled CPU operators, from the managed environment `vllm`, without importing vLLM.

Where that environment is made, attention, norms and products of the lean decoder go through them:
each is one call in which torch needs several. One library registers them as `torch.ops._C`; which
of the three it is follows vLLM's own choice (`vllm/platforms/cpu.py`, `import_kernels`). It must be
built for the torch at hand, and ends a process that later imports vLLM itself. The one for AVX2 is
left alone: logits come out 1.3 to 1.5 times as far from float32's as torch's own.
"""

from __future__ import annotations

import os
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from quantkit.backends.environments.managed import ready
from quantkit.runtime.vllm_ops import library as vllm_library

CREATE = "quantkit env create vllm"
SWITCH = "QUANTKIT_VLLM_OPERATORS"
"""`off` in this variable computes as a machine does that has no such environment."""

LOCK = threading.Lock()
"""Held during a product or attention: they share one scratchpad in vLLM's library."""

_SHAPES = 128
"""Shapes of input whose oneDNN plans a weight keeps, as vLLM has it."""


@cache
def missing() -> str | None:
    """Why vLLM's CPU operators are not to be had, or None once they are loaded."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH} is off"
    if (found := torch.backends.cpu.get_cpu_capability()) == "AVX2":
        return f"vLLM's operators are less exact than torch on a CPU with {found} only"
    python = ready("vllm")
    if python is None:
        return f"needs vLLM's CPU operators: {CREATE}"
    packages = next(python.parent.parent.glob("lib/python*/site-packages"), None)
    library = packages and packages / "vllm" / _library()
    if not packages or not library or not library.is_file():
        return f"{python.parent.parent} has no CPU operators of vLLM"
    theirs = _torch_of(packages)
    if theirs != torch.__version__:
        return f"vLLM's operators are built for torch {theirs}, this is {torch.__version__}"
    return vllm_library.load(library)


def _library() -> str:
    return "_C.abi3.so" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512.abi3.so"


def _torch_of(packages: Path) -> str:
    folder = next(packages.glob("torch-*.dist-info"), None)
    return folder.name.removesuffix(".dist-info").removeprefix("torch-") if folder else "unknown"


def usable(x: torch.Tensor) -> bool:
    """Whether the operators compute a tensor of this kind: bfloat16 on a CPU."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and missing() is None


class Weight:
    """A weight in oneDNN's arrangement, kept by vLLM's library and deleted with this object.

    `nbytes` is what it takes there, which torch does not count.
    """

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.handle = torch.tensor(pointer, dtype=torch.int64)
        self.nbytes = nbytes
        weakref.finalize(self, torch.ops._C.release_dnnl_matmul_handler, pointer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        return self  # nothing writes to it

    def __reduce__(self) -> NoReturn:
        raise TypeError("a weight in oneDNN's arrangement is of one process")


def int8_weight(codes: torch.Tensor, scale: torch.Tensor) -> Weight:
    """int8 codes [out, in] and scale float32 [out], for activations with a scale a token."""
    with LOCK:
        pointer = torch.ops._C.create_onednn_scaled_mm_handler(
            codes.t(), scale, torch.bfloat16, True, False, _SHAPES
        )
    return Weight(pointer, codes.nbytes)


def plain_weight(weight: torch.Tensor) -> Weight:
    """A bfloat16 weight [out, in]."""
    with LOCK:
        pointer = torch.ops._C.create_onednn_mm_handler(weight.contiguous().t(), _SHAPES)
    return Weight(pointer, weight.nbytes)
