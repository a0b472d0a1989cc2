"""Weights expanded once at load, activations not quantized: fast, and blind to their rounding.

A report made with it says "weights only". `auto` never picks it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.backends.process.float32_products import linear
from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.linear.description import LayerDescription, rows_of

NAME = "dequantized"
BLOCK_ROWS = 256


class Packed(NamedTuple):
    """The 16-bit weight [out, in]."""

    weight: torch.Tensor


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001
    """Runs everywhere."""
    return None


def rejects(layer: LayerDescription) -> str | None:  # noqa: ARG001
    """Computes every scheme's weights."""
    return None


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    result = torch.empty(weight.q.shape, dtype=layer.dtype, device=weight.q.device)
    height = weight.format.block[0] if weight.format.block else 1
    step = -(-BLOCK_ROWS // height) * height
    for start in range(0, result.shape[0], step):
        rows = slice(start, min(start + step, result.shape[0]))
        result[rows] = dequantize(rows_of(weight, rows))
    return Packed(result)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    return linear(x, packed.weight)
