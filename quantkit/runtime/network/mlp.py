"""The gate of a Llama-like MLP; on a GPU in one kernel."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu

from quantkit.runtime.linear.kernels.base import no_gpu, no_triton


class Mlp(nn.Module):
    """Gate and up in one layer, and the layer down."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] → the same shape."""
        result: torch.Tensor = self.down(silu_mul(self.gate_up(x)))
        return result


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) × second half of [..., 2 width]."""
    if fused_on(gate_up.device):
        from quantkit.runtime.triton import elementwise

        return elementwise.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


def fused_on(device: torch.device) -> bool:
    """Whether our own kernels run on the device."""
    return device.type == "cuda" and no_gpu(device) is None and no_triton() is None
