"""Weights and activations as a scheme leaves them, in the numbers of the streaming writer."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.linear.activations import global_scale, quantize_codes, round_groups
from quantkit.runtime.loading.rounded import round_weight


def rounded_weight(
    weight: torch.Tensor, number: NumberFormat, largest: float | None = None
) -> torch.Tensor:
    """The weight [out, in] through a number format and back, float32.

    `largest`: the magnitude that sets NVFP4's global scale, that of all that are fused with it;
    None: this weight's. Raises NonFiniteError.
    """
    return dequantize(round_weight(weight, number, largest))


def rounded_input(x: torch.Tensor, number: NumberFormat) -> torch.Tensor:
    """Activations [n, in] as the scheme rounds them, in their dtype.

    A static scale is the one that these activations would be calibrated to.
    """
    if number.scale != "float":
        scale = global_scale(x) if number.scale == "e4m3" else None
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
