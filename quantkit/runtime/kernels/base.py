"""The contract of a kernel: one matrix product for the layers whose scheme it can compute."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.layer import Layer


class Kernel(Protocol):
    """What each file of this folder provides, as module-level names."""

    NAME: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing of this kernel runs on the device, or None. Imports no GPU library."""

    def rejects(self, layer: Layer) -> str | None:
        """Why this kernel cannot compute the layer, or None."""

    def prepare(self, weight: QuantWeight, layer: Layer) -> Any:
        """The weight in the kernel's own arrangement, on the device of `weight.q`.

        `weight` comes as `layer.centred` and `layer.contiguous_groups` leave it; its bias and
        input multiplier are the caller's. The result is a NamedTuple of tensors and numbers.
        """

    def apply(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        """y [m, out] in the dtype of x [m, in], contiguous; no bias."""
