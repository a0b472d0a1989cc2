"""The contract of a kernel: one matrix product for the layers whose scheme it can compute."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription


class Kernel(Protocol):
    """What each file of this folder provides, as module-level names."""

    NAME: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing of this kernel runs on the device, or None. Imports no GPU library."""

    def rejects(self, layer: LayerDescription) -> str | None:
        """Why this kernel cannot compute the layer, or None."""

    def prepare(self, weight: QuantWeight, layer: LayerDescription) -> Any:
        """The weight in the kernel's own arrangement, on the device of `weight.q`.

        `weight` comes as `layer.centred` and `layer.contiguous_groups` leave it; its bias and
        input multiplier are the caller's. The result is a NamedTuple of tensors and numbers.
        """

    def apply(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        """y [m, out] in the dtype of x [m, in], both contiguous; no bias."""


GPU_ONLY = "runs on a CUDA GPU"

FP4_FORMATS = frozenset({(16, "e4m3"), (32, "e8m0")})
"""Group size and scale of NVFP4 and MXFP4."""


def no_gpu(device: torch.device, least: tuple[int, int] = (8, 0)) -> str | None:
    """Why the device is no GPU of at least this compute capability that torch can use, or None."""
    if device.type != "cuda":
        return GPU_ONLY
    if not torch.cuda.is_available():
        return "this torch sees no GPU"
    if torch.version.hip:  # whose numbers are not NVIDIA's compute capabilities
        return "runs on an NVIDIA GPU, and this torch is built for ROCm"
    found = torch.cuda.get_device_capability(device)
    if found < least:
        wanted, there = (".".join(map(str, pair)) for pair in (least, found))
        return f"needs compute capability {wanted}, and {device} has {there}"
    return None


@cache
def no_triton(least: tuple[int, int] = (3, 5)) -> str | None:
    """Why there is no Triton of a version that our kernels compile with, or None."""
    wanted = ".".join(map(str, least))
    if not find_spec("triton"):
        return f"needs Triton: pip install 'triton>={wanted}'"
    found = version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < least:
        return f"needs Triton {wanted}, this is {found}: pip install 'triton>={wanted}'"
    return None


def no_gluon() -> str | None:
    """Why there is no Gluon, Triton's language with explicit layouts, or None."""
    return no_triton((3, 6))


def not_bfloat16(layer: LayerDescription) -> str | None:
    """Why the layer's dtype is not the one that a kernel for bfloat16 computes in, or None."""
    if layer.dtype == torch.bfloat16:
        return None
    return f"computes in bfloat16, not {str(layer.dtype).removeprefix('torch.')}"
