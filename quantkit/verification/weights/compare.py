"""How well a quantized weight matches what it should be: one pass in blocks of rows.

With T the target (the source's weight, scaled as the method scaled it) and Q the dequantized
weight, three sums a cell (the part of a row that shares one scale) say all: T·T, T·Q and Q·Q. Their
totals give the SQNR; within a cell, gain = T·Q / T·T is 1 but for rounding, so a cell whose codes
point the right way and whose gain is off has a wrong scale, however well the rest of the layer is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import dequantize, effective_scale
from quantkit.verification.findings import MOST_DB, decibels

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 17
"""Elements a block of rows: source, target and codes of one block stay in the cache."""

_LARGEST_E2M1 = 7
"""FP4's code of 6, without its sign bit."""
_LARGEST_E4M3 = 448.0


@dataclass(frozen=True)
class Sums:
    """T·T, T·Q and Q·Q by cell, float32 [rows, cells a row], and by column, float64 [columns].

    `shift` is the mean of (Q - T) / scale over the cells of an integer format: 0 but for rounding,
    and ±1 where all zero points are one off.
    """

    target: torch.Tensor
    cross: torch.Tensor
    actual: torch.Tensor
    columns: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    shift: float = 0.0

    @property
    def sqnr_db(self) -> float:
        """10 log10 T·T / |T - Q|², finite; at most 70 (the sums hold seven digits)."""
        target, cross, actual = (
            float(t.double().sum()) for t in (self.target, self.cross, self.actual)
        )
        if target == 0:
            return 70.0 if actual == 0 else -MOST_DB
        return decibels(target, max(target - 2 * cross + actual, target * 1e-7))

    def row_gain(self) -> torch.Tensor:
        """Least-squares scale of every row of Q against T, float32 [rows]; 1 for a row of zeros."""
        import torch

        target, cross = self.target.sum(1), self.cross.sum(1)
        return torch.where(target > 0, cross / target, 1.0)


def compare(
    weight: QuantWeight,
    source: torch.Tensor,
    *,
    columns: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    unclipped: bool = False,
) -> Sums:
    """Compare a quantized weight with `source` [out, in] scaled by `rows` [out], `columns` [in].

    The input multiplier of the weight is undone in the target: T is what the quantizer saw.
    Column sums are made where columns are scaled, because only there can one be wrong by itself.
    `unclipped` leaves out the elements whose code is at an end of its range.
    """
    import torch

    if weight.input_multiplier is not None:
        inverse = 1.0 / weight.input_multiplier
        columns = inverse if columns is None else columns * inverse
        weight = replace(weight, input_multiplier=None)
    height = weight.format.block[0] if weight.format.block else 1
    count, width = source.shape
    step = ceil(max(1, _BLOCK_ELEMENTS // width) / height) * height
    cell, order = _cells(weight, width)
    sums: list[list[torch.Tensor]] = [[], [], []]
    by_column = [torch.zeros(width, dtype=torch.float64) for _ in range(3)]
    differences: list[torch.Tensor] = []
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        target, actual = source[block].float(), dequantize(_rows(weight, block))
        if columns is not None:
            target = target * columns
        if rows is not None:
            target = target * rows[block, None]
        if unclipped:
            inside = ~_at_an_end(weight, block)
            target, actual = target * inside, actual * inside
        products = (target * target, target * actual, actual * actual)
        for total, into, product in zip(by_column, sums, products, strict=True):
            grouped = product if order is None else product[:, order]
            into.append(grouped.reshape(product.shape[0], -1, cell).sum(-1))
            if columns is not None:
                total += product.sum(0)
        if weight.format.is_int:
            difference = actual.sub_(target)
            grouped = difference if order is None else difference[:, order]
            differences.append(grouped.reshape(difference.shape[0], -1, cell).mean(-1))
    first, second, third = (torch.cat(part) for part in sums)
    of_columns = (by_column[0], by_column[1], by_column[2]) if columns is not None else None
    shift = _shift(weight, torch.cat(differences)) if differences else 0.0
    return Sums(first, second, third, of_columns, shift)


def nearest_other(
    weight: QuantWeight, source: torch.Tensor, rows: torch.Tensor, *, columns: torch.Tensor | None
) -> torch.Tensor:
    """The largest cosine of each of some rows (indices) with another row of the source, [rows].

    `columns` as in `compare`. The scale of a row has no part in a cosine.
    """
    import torch
    from torch.nn.functional import normalize

    if weight.input_multiplier is not None:
        inverse = 1.0 / weight.input_multiplier
        columns = inverse if columns is None else columns * inverse
        weight = replace(weight, input_multiplier=None)
    each = (slice(row, row + 1) for row in rows.tolist())
    actual = normalize(torch.cat([dequantize(_rows(weight, one)) for one in each]))
    best = torch.full((len(rows),), -1.0)
    step = max(1, _BLOCK_ELEMENTS // source.shape[1])
    for start in range(0, len(source), step):
        target = source[start : start + step].float()
        cosines = actual @ normalize(target if columns is None else target * columns).t()
        own = rows[:, None] == torch.arange(start, start + len(target))
        best = best.maximum(cosines.masked_fill(own, -1.0).amax(1))
    return best


def plain(weight: torch.Tensor) -> QuantWeight:
    """A 16-bit weight [out, in] in the form that `compare` takes."""
    import torch

    return QuantWeight(NumberFormat("int8", "tensor"), weight, torch.ones(1, 1))


def _shift(weight: QuantWeight, difference: torch.Tensor) -> float:
    """Mean over the cells of `difference` / scale; no single cell counts for more than two steps.

    0 where the cells are not those of the scales.
    """
    scale = effective_scale(weight)
    if scale.shape[1] != difference.shape[1] or scale.shape[0] not in (1, difference.shape[0]):
        return 0.0
    steps = (difference / scale).nan_to_num(0.0).clamp(-2.0, 2.0)
    return float(steps.mean())


def _at_an_end(weight: QuantWeight, rows: slice) -> torch.Tensor:
    """Which elements of some rows hold the largest or the smallest value of their format."""
    codes = weight.q[rows]
    if weight.format.element == "fp4_e2m1":
        return codes % 8 == _LARGEST_E2M1
    if weight.format.element == "fp8_e4m3":
        codes, ends = codes.float(), (-_LARGEST_E4M3, _LARGEST_E4M3)
    else:
        ends = (int(weight.q.min()), int(weight.q.max()))
    return (codes <= ends[0]) | (codes >= ends[1])


def _cells(weight: QuantWeight, columns: int) -> tuple[int, torch.Tensor | None]:
    """Columns a cell, and the order that brings those of one scale together (None: they are)."""
    width = weight.format.block[1] if weight.format.block else weight.format.group_size
    if not width or columns % width:
        return columns, None
    if weight.g_idx is None or bool((weight.g_idx.diff() >= 0).all()):
        return width, None
    return width, weight.g_idx.argsort(stable=True)


def _rows(weight: QuantWeight, rows: slice) -> QuantWeight:
    """Some rows of a weight; `rows` starts at a multiple of the block's height."""
    height = weight.format.block[0] if weight.format.block else 1
    grid = slice(rows.start // height, ceil(rows.stop / height))
    one = weight.scale.shape[0] == 1 and weight.q.shape[0] > height
    zero = weight.zero_point
    return replace(
        weight,
        q=weight.q[rows],
        scale=weight.scale if one else weight.scale[grid],
        zero_point=zero if zero is None or one else zero[grid],
    )
