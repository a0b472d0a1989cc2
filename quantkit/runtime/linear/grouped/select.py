"""The ordered list of grouped kernels, and the choice of one for the experts of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.schemes import Scheme
from quantkit.runtime.linear.grouped import (
    fp8_scaled_grouped_mm,
    marlin_moe_vllm,
    plain_grouped_mm,
)
from quantkit.runtime.linear.grouped.base import Activation, GroupedKernel
from quantkit.runtime.linear.kernels import marlin_vllm
from quantkit.runtime.linear.kernels.select import names, packed_tensors

KERNELS: tuple[GroupedKernel, ...] = (marlin_moe_vllm, fp8_scaled_grouped_mm, plain_grouped_mm)


def kernels_of_experts(scheme: Scheme, device: torch.device) -> list[str]:
    """The kernels that an expert of such weights may get, by name and in order; empty: the usual
    ones. In 4 bits Marlin comes first where it computes all experts of a layer as one."""
    if scheme.weight.element == "int8" or marlin_moe_vllm.unavailable(device):
        return []
    return sorted(names(), key=lambda name: name != marlin_vllm.NAME)


class Grouped(nn.Module):
    """Both layers of all experts in the arrangement of one grouped kernel."""

    def __init__(
        self, kernel: GroupedKernel, ups: Sequence[nn.Module], downs: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.layers: tuple[Any, Any] = (kernel.prepare(ups), kernel.prepare(downs))

    def forward(
        self,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        activation: Activation,
    ) -> torch.Tensor:
        """See `GroupedKernel.apply`."""
        return self.kernel.apply(hidden, chosen, weights, self.layers, activation)

    def tensors(self) -> list[torch.Tensor]:
        """What it holds in memory."""
        return [tensor for layer in self.layers for tensor in packed_tensors(layer)]


def group(
    ups: Sequence[nn.Module], downs: Sequence[nn.Module], device: torch.device
) -> Grouped | None:
    """The experts as one product a layer; None where they are computed one by one."""
    for kernel in KERNELS:
        if not (kernel.unavailable(device) or kernel.rejects(ups) or kernel.rejects(downs)):
            return Grouped(kernel, ups, downs)
    return None
