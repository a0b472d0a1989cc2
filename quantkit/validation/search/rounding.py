"""Weights and activations as a scheme leaves them, in the numbers of the streaming writer."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit.backends.streaming.rtn import absolute_maximum, nvfp4_global_scale, quantize_rows
from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import decode_e8m0, dequantize
from quantkit.runtime.linear.activations import FP4_MAX, FP8_MAX, quantize_codes, round_groups


def rounded_weight(
    weight: torch.Tensor, number: NumberFormat, largest: float | None = None
) -> torch.Tensor:
    """The weight [out, in] through a number format and back, float32.

    `largest`: the magnitude that sets NVFP4's global scale, that of all that are fused with it;
    None: this weight's. Raises NonFiniteError.
    """
    if number.granularity == "tensor":
        flat = replace(number, granularity="channel")
        return rounded_weight(weight.reshape(1, -1), flat).view(weight.shape)
    scale = None
    if number.scale == "e4m3":
        most = absolute_maximum(weight) if largest is None else largest
        scale = nvfp4_global_scale(most, weight.dtype)
    rows = quantize_rows(weight.contiguous(), number, global_scale=scale)
    stored = decode_e8m0(rows.scale) if number.scale == "e8m0" else rows.scale.float()
    zero = None if rows.zero_point is None else rows.zero_point.float()
    inverse = None if scale is None else 1 / scale.double().reshape(())
    return dequantize(QuantWeight(number, rows.codes, stored, zero, inverse))


def rounded_input(x: torch.Tensor, number: NumberFormat) -> torch.Tensor:
    """Activations [n, in] as the scheme rounds them, in their dtype.

    A static scale is the one that these activations would be calibrated to.
    """
    if number.scale != "float":
        scale = None
        if number.scale == "e4m3":
            scale = (x.abs().amax().float() / (FP8_MAX * FP4_MAX)).clamp_min(1e-12)
        values = round_groups(x, number, scale)
        return values if scale is None else (values.float() * scale).to(x.dtype)
    symmetric = replace(number, symmetric=True)
    codes = quantize_codes(x, symmetric, None)
    values = codes.values.float()
    factor = codes.scale
    if number.granularity == "group":
        assert number.group_size
        factor = factor.repeat_interleave(number.group_size, dim=1)[:, : x.shape[1]]
    return (values * factor).to(x.dtype)
