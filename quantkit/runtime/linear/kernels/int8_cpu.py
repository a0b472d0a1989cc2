"""INT8 weights and activations on a CPU, through torch's oneDNN int8 matmul (AMX, VNNI).

The weight is arranged once for the instructions at hand; sums are exact in int32. A scale a token
multiplies the float32 result in blocks of rows that stay in the cache.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.activations import quantize_codes
from quantkit.runtime.linear.description import LayerDescription

NAME = "int8_cpu"
BLOCK_ROWS = 256
_ONE, _ZERO = torch.ones(()), torch.zeros((), dtype=torch.int32)
_MIDDLE = torch.full((), 128, dtype=torch.int32)


class Packed(NamedTuple):
    """`weight` is oneDNN's own arrangement; `correction` [out] is what a zero point adds."""

    weight: torch.Tensor
    scale: torch.Tensor
    input: NumberFormat
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    correction: torch.Tensor | None


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    if device.type != "cpu":
        return "runs on a CPU"
    return inexact()


@cache
def inexact() -> str | None:
    """Why int8 products are not to be trusted on this CPU: instructions before VNNI saturate."""
    codes = torch.full((16, 64), 127, dtype=torch.int8)
    try:
        packed = prepack(codes)
        result = multiply(codes, packed, torch.ones(16))
    except (RuntimeError, AttributeError) as error:
        return f"torch has no int8 matmul here ({str(error).splitlines()[0]})"
    return None if bool((result == 127 * 127 * 64).all()) else "this CPU's int8 sums saturate"


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, activation = layer.scheme.weight, layer.scheme.input
    if weight.element != "int8" or activation is None or activation.element != "int8":
        return "computes INT8 weights with INT8 activations"
    if weight.granularity not in ("tensor", "channel"):
        return f"needs one weight scale a channel, not a {weight.granularity}"
    if activation.granularity not in ("tensor", "token"):
        return f"needs one activation scale a tensor or token, not a {activation.granularity}"
    if activation.dynamic and activation.granularity == "tensor":
        return "quantizes blocks of rows: a dynamic scale must be one a token"
    if layer.has_zero_point:
        return "needs symmetric weights"
    return None


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    assert layer.scheme.input is not None
    scale = weight.scale.expand(weight.q.shape[0], 1).reshape(-1).contiguous()
    correction = None
    if weight.input_zero_point is not None:
        sums = weight.q.sum(1, dtype=torch.int32)
        correction = sums * scale * weight.input_zero_point.reshape(())
    return Packed(
        weight=prepack(weight.q),
        scale=scale,
        input=layer.scheme.input,
        input_scale=weight.input_scale,
        input_zero_point=weight.input_zero_point,
        correction=correction,
    )


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    result = x.new_empty(x.shape[0], packed.scale.shape[0])
    for start in range(0, x.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        codes = quantize_codes(x[rows], packed.input, packed.input_scale, packed.input_zero_point)
        product = multiply(codes.values, packed.weight, packed.scale)
        if packed.correction is not None:
            product -= packed.correction
        result[rows] = product.mul_(codes.scale)
    return result


def prepack(codes: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] in oneDNN's arrangement for this CPU."""
    packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    return packed


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 codes [m, in] @ prepacked codes.T × scale [out], float32 [m, out].

    VNNI multiplies unsigned by signed codes: without AMX, oneDNN has nothing but its reference loop
    for signed ones (thousands of times slower), so that they are given as unsigned around 128.
    """
    zero = _ZERO
    if not _amx():
        x, zero = x.view(torch.uint8) ^ 128, _MIDDLE
    result: torch.Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
        x, _ONE, zero, weight, scale, _no_zero_points(scale.shape[0]), None, 1.0, 0,
        torch.float32, "none", [], "",
    )  # fmt: skip
    return result


@cache
def _amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


@cache
def _no_zero_points(rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.int32)
