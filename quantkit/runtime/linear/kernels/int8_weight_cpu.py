"""INT8 weights with 16-bit activations on a CPU, as two int8 products.

A row of activations becomes 16-bit fixed point, whose two bytes are rows of one int8 matmul:
x ≈ (256 × high + low) × scale, off by at most 2^-16 of the row's largest magnitude. That is under
what rounding the result to bfloat16 takes away, and a row costs half the traffic of bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.activations import largest_magnitude
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels import int8_cpu

NAME = "int8_weight_cpu"
BLOCK_ROWS = 128
_LARGEST = 127 * 256 + 127
_LEAST = torch.finfo(torch.float32).tiny


class Packed(NamedTuple):
    """`weight` in oneDNN's own arrangement, `scale` float32 [out]."""

    weight: torch.Tensor
    scale: torch.Tensor


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return int8_cpu.unavailable(device)


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight = layer.scheme.weight
    if weight.element != "int8" or layer.scheme.input is not None:
        return "computes INT8 weights with 16-bit activations"
    if weight.granularity not in ("tensor", "channel"):
        return f"needs one weight scale a channel, not a {weight.granularity}"
    if layer.has_zero_point:
        return "needs symmetric weights"
    if layer.dtype != torch.bfloat16:
        return f"keeps less of the activations than {str(layer.dtype).removeprefix('torch.')} does"
    return None


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:  # noqa: ARG001
    """See `Kernel.prepare`."""
    scale = weight.scale.expand(weight.q.shape[0], 1).reshape(-1)
    return Packed(int8_cpu.prepack(weight.q), scale.contiguous())


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    result = x.new_empty(x.shape[0], packed.scale.shape[0])
    for start in range(0, x.shape[0], BLOCK_ROWS):
        rows = x[start : start + BLOCK_ROWS]
        count = rows.shape[0]
        scale = (largest_magnitude(rows) / _LARGEST).clamp_(min=_LEAST)
        fixed = (rows.float() / scale).round_().to(torch.int32)
        high = (fixed + 128) >> 8
        codes = torch.cat((high, fixed - (high << 8))).to(torch.int8)
        product = int8_cpu.multiply(codes, packed.weight, packed.scale)
        product = product[count:].add_(product[:count], alpha=256)
        result[start : start + count] = product.mul_(scale)
    return result
