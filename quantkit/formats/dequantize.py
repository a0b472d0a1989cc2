"""The canonical weight back to float32: the formula of `QuantWeight`, in row blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.base import QuantWeight

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

_BLOCK_ELEMENTS = 1 << 18


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """E8M0 exponents, biased by 127, in uint8 or float8_e8m0fnu → float32 powers of two.

    Code 255 is NaN (OCP Microscaling Formats 1.0); code 0 is 2^-127, a float32 subnormal.
    """
    import torch

    raw = codes.view(torch.uint8)
    powers = torch.exp2(raw.double() - 127).float()
    return torch.where(raw == 255, torch.nan, powers)


def effective_scale(weight: QuantWeight) -> torch.Tensor:
    """scale × global_scale in float32, rounded once, on the grid of the scale."""
    if weight.global_scale is None:
        return weight.scale
    return (weight.scale.double() * weight.global_scale.double()).float()


def dequantize(weight: QuantWeight) -> torch.Tensor:
    """The weight as float32 [out, in], by the formula of `QuantWeight`.

    Works in blocks of rows that fit the cache: no temporary is larger than about 1 MiB.
    """
    import torch

    rows, columns = weight.q.shape
    scale = effective_scale(weight)
    result = torch.empty(rows, columns, dtype=torch.float32, device=weight.q.device)
    table = _code_values(weight.format).to(weight.q.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        values = result[block]
        if not weight.format.is_int:
            codes = weight.q[block].view(torch.uint8).reshape(-1).int()
            torch.index_select(table, 0, codes, out=values.view(-1))
        else:
            values.copy_(weight.q[block])
        if weight.zero_point is not None:
            cells, grid = _align(values, weight.zero_point, weight, block)
            cells.sub_(grid)
        cells, grid = _align(values, scale, weight, block)
        cells.mul_(grid)
        if weight.input_multiplier is not None:
            values.mul_(weight.input_multiplier)
    return result


def _code_values(number: NumberFormat) -> torch.Tensor:
    """The value of every code of a floating-point format, float32."""
    import torch

    if number.element == "fp4_e2m1":
        return torch.tensor(E2M1_VALUES)
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _align(
    values: torch.Tensor, grid: torch.Tensor, weight: QuantWeight, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of `values`, the weight's rows `rows`, and the part of `grid` to broadcast with it."""
    import torch

    number: NumberFormat = weight.format
    columns = values.shape[1]
    if number.granularity == "block":
        assert number.block
        height, width = number.block
        picked = torch.arange(rows.start, rows.stop, device=grid.device) // height
        return values, grid[picked].repeat_interleave(width, dim=1)[:, :columns]
    part = grid[rows] if grid.shape[0] > 1 else grid
    if weight.g_idx is not None:
        return values, part.index_select(1, weight.g_idx)
    if number.granularity != "group":
        return values, part
    assert number.group_size
    if columns % number.group_size:
        return values, part.repeat_interleave(number.group_size, dim=1)[:, :columns]
    return values.view(len(values), -1, number.group_size), part.unsqueeze(-1)
