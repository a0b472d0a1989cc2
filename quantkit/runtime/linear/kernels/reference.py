"""Every scheme in plain PyTorch: activations quantized as the scheme says, codes kept packed.

The product runs in the layer's dtype (bfloat16: the codes are exact in it, sums are float32
inside) and scales of tensors, tokens and channels multiply the result, as in the engines' kernels;
theirs multiply float32 sums, so that this one rounds to bfloat16 once more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.backends.process.float32_products import linear
from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.activations import global_scale, quantize_codes, round_groups
from quantkit.runtime.linear.compact import CompactWeight, compact, fp8_values
from quantkit.runtime.linear.description import LayerDescription

NAME = "reference"


class Packed(NamedTuple):
    """The weight, and how its input is quantized."""

    weight: CompactWeight
    input: NumberFormat | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001
    """Runs everywhere."""
    return None


def rejects(layer: LayerDescription) -> str | None:  # noqa: ARG001
    """Computes every scheme."""
    return None


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`; float16 is computed in float32, whose range the codes need."""
    dtype = torch.bfloat16 if layer.dtype == torch.bfloat16 else torch.float32
    return Packed(
        compact(weight, dtype), layer.scheme.input, weight.input_scale, weight.input_zero_point
    )


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    values, scale = _quantized(x.to(packed.weight.dtype), packed)
    return multiply(values, packed.weight, scale).to(x.dtype)


def multiply(x: torch.Tensor, weight: CompactWeight, scale: torch.Tensor | None) -> torch.Tensor:
    """(x [m, in] @ inner.T) × outer × scale, [m, out] in the dtype of x; scale [m, 1] or scalar."""
    result = x.new_empty(x.shape[0], weight.rows)
    for rows, inner in weight.blocks():
        factor = weight.outer[rows] if weight.outer.numel() > 1 else weight.outer
        if scale is not None:
            factor = factor * scale
        torch.mul(linear(x, inner), factor, out=result[:, rows])
    return result


def _quantized(x: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The quantized input in the dtype of x, and the scale that is left to multiply."""
    number = packed.input
    if number is None:
        return x, None
    if number.scale != "float":
        scale = packed.input_scale
        if scale is None and number.scale == "e4m3":
            scale = global_scale(x)
        return round_groups(x, number, scale), scale
    codes = quantize_codes(x, number, packed.input_scale, packed.input_zero_point)
    fp8 = number.element == "fp8_e4m3"
    values = fp8_values(codes.values, x.dtype) if fp8 else codes.values.to(x.dtype)
    if codes.zero_point is not None:
        values = values - codes.zero_point.to(x.dtype)
    if number.granularity != "group":
        return values, codes.scale
    assert number.group_size
    wide = codes.scale.repeat_interleave(number.group_size, dim=1)[:, : x.shape[1]]
    return (values * wide).to(x.dtype), None
