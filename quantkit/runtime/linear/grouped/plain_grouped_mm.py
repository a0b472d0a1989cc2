"""Experts in 16 bit by torch's `_grouped_mm` (CUTLASS)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from quantkit.runtime.linear.grouped.base import Activation, Sorted, alike, one_after_the_other
from quantkit.runtime.linear.kernels.base import no_gpu
from quantkit.runtime.linear.modules import PlainLinear

NAME = "plain_grouped_mm"
_ALIGNMENT = 8
"""Rows begin at multiples of 16 bytes."""


class Packed(NamedTuple):
    """`weight` bfloat16 [experts, out, in]."""

    weight: torch.Tensor


def unavailable(device: torch.device) -> str | None:
    """See `GroupedKernel.unavailable`."""
    return no_gpu(device, (9, 0))


def rejects(layers: Sequence[nn.Module]) -> str | None:
    """See `GroupedKernel.rejects`."""
    reason = alike(layers, "")
    if reason is not None:
        return reason
    shapes = {tuple(layer.weight.shape) for layer in layers if isinstance(layer, PlainLinear)}
    if len(shapes) > 1:
        return "needs experts of one shape"
    rows, columns = shapes.pop()
    if rows % _ALIGNMENT or columns % _ALIGNMENT:
        return f"needs multiples of {_ALIGNMENT} outputs and inputs, not {rows} and {columns}"
    if any(layer.weight.dtype != torch.bfloat16 for layer in layers):
        return "computes in bfloat16"
    return None


def prepare(layers: Sequence[nn.Module]) -> Packed:
    """See `GroupedKernel.prepare`."""
    return Packed(torch.stack([layer.weight for layer in layers if isinstance(layer, PlainLinear)]))


def apply(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    layers: tuple[Packed, Packed],
    activation: Activation,
) -> torch.Tensor:
    """See `GroupedKernel.apply`."""
    products = (partial(_multiply, layers[0]), partial(_multiply, layers[1]))
    count = len(layers[0].weight)
    return one_after_the_other(hidden, chosen, weights, count, products, activation)


def _multiply(layer: Packed, x: torch.Tensor, rows: Sorted) -> torch.Tensor:
    weight = layer.weight.transpose(-2, -1)
    product: torch.Tensor = torch._grouped_mm(x, weight, offs=rows.ends)
    return product
