"""INT8 weights on a CPU by float32 products: for CPUs whose int8 instructions saturate.

float32 holds every whole number up to 2^24, so that a sum of `EXACT_COLUMNS` products of int8 codes
is exact in any order; such sums are added in float64. 16-bit activations are exact in float32 too,
and their sums are float32's. The weight stays in int8 and is cast some rows at a time: on Zen 3
that takes a fourth to a seventh of the reference's time from 64 rows on, and with one row it gains
or loses less than half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.activations import quantize_codes
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels import int8_cpu, int8_weight_cpu

NAME = "int8_float_cpu"
EXACT_COLUMNS = 2**24 // (128 * 128)
_EXPANDED = 1 << 20
"""Codes cast at a time: 4 MiB in float32."""


class Packed(NamedTuple):
    """`weight` int8 [out, in], `scale` float32 [out]; `input` None keeps activations."""

    weight: torch.Tensor
    scale: torch.Tensor
    input: NumberFormat | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return None if device.type == "cpu" else "runs on a CPU"


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    if layer.scheme.input is None:
        return int8_weight_cpu.rejects(layer)
    return int8_cpu.rejects(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    scale = weight.scale.float().expand(weight.q.shape[0], 1).reshape(-1).contiguous()
    return Packed(
        weight.q.contiguous(),
        scale,
        layer.scheme.input,
        weight.input_scale,
        weight.input_zero_point,
    )


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    if packed.input is None:
        return _multiply(x.float(), packed, None, packed.weight.shape[1]).to(x.dtype)
    codes = quantize_codes(x, packed.input, packed.input_scale, packed.input_zero_point)
    values, columns = codes.values.float(), EXACT_COLUMNS
    if codes.zero_point is not None:
        values -= codes.zero_point  # now of up to 9 bits
        columns //= 2
    return _multiply(values, packed, codes.scale, columns).to(x.dtype)


def _multiply(
    x: torch.Tensor, packed: Packed, scale: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """x [m, in] @ codes.T × scales, float32 [m, out]; sums of more than `columns` in float64."""
    result = x.new_empty(x.shape[0], packed.weight.shape[0])
    step = max(1, _EXPANDED // packed.weight.shape[1])
    parts = torch.split(x, columns, dim=1)
    for start in range(0, result.shape[1], step):
        rows = slice(start, start + step)
        weights = torch.split(packed.weight[rows].float(), columns, dim=1)
        product = linear(parts[0], weights[0])
        if len(parts) > 1:
            total = product.double()
            for part, weight in zip(parts[1:], weights[1:], strict=True):
                total += linear(part, weight)
            product = total.float()
        torch.mul(product, packed.scale[rows], out=result[:, rows])
    return result if scale is None else result.mul_(scale)
