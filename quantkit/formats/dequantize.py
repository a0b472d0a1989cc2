"""The canonical weight back to float32: the formula of `QuantWeight`, in row blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.formats.base import QuantWeight
from quantkit.schemes import NumberFormat

if TYPE_CHECKING:
    import torch

E2M1_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
"""FP4 E2M1: code (sign, two exponent bits, one mantissa bit) → value."""

_BLOCK_ELEMENTS = 1 << 20


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """E8M0 exponents, biased by 127, in uint8 or float8_e8m0fnu → float32 powers of two.

    Code 255 is NaN (OCP Microscaling Formats 1.0); code 0 is 2^-127, a float32 subnormal.
    """
    import torch

    raw = codes.view(torch.uint8)
    powers = torch.exp2(raw.double() - 127).float()
    return torch.where(raw == 255, torch.nan, powers)


def encode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """float32 powers of two → uint8 exponents, biased by 127 (the inverse of `decode_e8m0`)."""
    import torch

    return (torch.log2(scale.double()).round() + 127).to(torch.uint8)


def effective_scale(weight: QuantWeight) -> torch.Tensor:
    """scale × global_scale in float32, rounded once, on the grid of the scale."""
    if weight.global_scale is None:
        return weight.scale
    return (weight.scale.double() * weight.global_scale.double()).float()


def dequantize(weight: QuantWeight) -> torch.Tensor:
    """The weight as float32 [out, in], by the formula of `QuantWeight`.

    Works in blocks of rows, so that no temporary is larger than about 4 MiB.
    """
    import torch

    rows, columns = weight.q.shape
    scale = effective_scale(weight)
    result = torch.empty(rows, columns, dtype=torch.float32, device=weight.q.device)
    table = torch.tensor(E2M1_VALUES, device=weight.q.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        codes = weight.q[block]
        values = table[codes.int()] if weight.format.element == "fp4_e2m1" else codes.float()
        if weight.zero_point is not None:
            values = values - _expand(weight.zero_point, weight, block)
        values = values * _expand(scale, weight, block)
        if weight.input_multiplier is not None:
            values = values * weight.input_multiplier
        result[block] = values
    return result


def _expand(grid: torch.Tensor, weight: QuantWeight, rows: slice) -> torch.Tensor:
    """The rows `rows` of a grid of scales, broadcastable to the rows of the weight."""
    import torch

    number: NumberFormat = weight.format
    columns = weight.q.shape[1]
    if number.granularity == "block":
        assert number.block
        height, width = number.block
        picked = torch.arange(rows.start, rows.stop, device=grid.device) // height
        return grid[picked].repeat_interleave(width, dim=1)[:, :columns]
    picked_rows = grid[rows] if grid.shape[0] > 1 else grid
    if weight.g_idx is not None:
        return picked_rows[:, weight.g_idx.long()]
    if number.granularity == "group":
        assert number.group_size
        return picked_rows.repeat_interleave(number.group_size, dim=1)[:, :columns]
    return picked_rows
