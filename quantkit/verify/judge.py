"""When the sums of a comparison mean damage: SQNR under the floor, or single scales off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.schemes import Scheme
from quantkit.verify.fidelity import Sums

if TYPE_CHECKING:
    import torch

KEPT_FLOOR_DB = 40.0
"""SQNR under which a rescaled 16-bit weight is not the source's (BF16 rounding leaves 50 dB)."""

_ROW_TOLERANCE = {16: 0.05, 8: 0.15, 4: 0.25, 3: 0.35, 2: 0.5}
"""Bits → how far the gain of a whole row may be from 1. Real outputs stay within 0.05 at 8 and 0.1
at 4 bits."""

_CELL_TOLERANCE = {16: 0.1, 8: 0.3, 4: 0.6, 3: 0.8, 2: 1.2}
"""The same for a single cell, wide enough for methods that move error between columns (GPTQ): real
outputs stay within 0.05, 0.26, 0.35 and 0.45."""

MOST_SHIFT = 0.3
"""Quantization steps by which a layer may lie from its source on average. Real outputs stay within
0.1; zero points that are one off shift it by 1."""

_GARBLED_DB = {8: (25.0, 10.0, 10.0), 4: (15.0, 3.0, -3.0)}
"""Bits → median SQNR of a sound layer's rows; under it a row, a cell is garbage. Rows of real
outputs have 21 dB and more at 8 and 9 at 4 bits, cells 21 and 3."""

_COLUMN_TOLERANCE = 0.3
_ALIGNED = 0.85
"""cos² between target and actual above which a cell is a scaled copy of what it should be."""

_SIGNIFICANT = 0.02
"""Share of the mean energy under which a cell is too faint to judge."""


def floor_db(scheme: Scheme | None) -> float:
    """The SQNR floor of a scheme (None: a kept weight that a fold rescaled)."""
    return KEPT_FLOOR_DB if scheme is None else scheme.sqnr_floor_db


def faults(sums: Sums, scheme: Scheme | None, unclipped: Callable[[], Sums]) -> list[str]:
    """What is wrong with single cells or columns, in words; empty when nothing is.

    A method that tunes its clipping may shrink a row or cell on purpose, so that one which is off
    must be off in `unclipped` too: the sums over codes inside of their range.
    """
    bits = 16 if scheme is None else scheme.weight.bits
    rows, cells = _rows_and_cells(sums, bits)
    if scheme is not None and (rows is not None or cells is not None):
        rows, cells = _rows_and_cells(sums, bits, unclipped())
    found = []
    target = sums.target
    if rows is not None:
        found.append(_say(rows, "rows", target.shape[0], f"row {rows.row}"))
    elif cells is not None:
        where = f"row {cells.row}, group {cells.column}"
        found.append(_say(cells, "groups", target.numel(), where))
    if sums.columns is not None:
        first, second, third = sums.columns
        channels = _off((first[None], second[None], third[None]), _COLUMN_TOLERANCE, 0.9)
        if channels is not None:
            count = first.numel()
            found.append(_say(channels, "input channels", count, f"channel {channels.column}"))
    return found


def garbled(sums: Sums, scheme: Scheme | None) -> str | None:
    """Rows or groups unlike the source in a layer that otherwise is like it, in words."""
    if scheme is None or scheme.weight.bits not in _GARBLED_DB:
        return None
    sound, of_row, of_cell = _GARBLED_DB[scheme.weight.bits]
    cells = (sums.target, sums.cross, sums.actual)
    whole = (cells[0].sum(1, True), cells[1].sum(1, True), cells[2].sum(1, True))
    for what, parts, least in (("rows", whole, of_row), ("groups", cells, of_cell)):
        ratios = _decibels(*parts)
        count = int((ratios < least).sum())
        if count and float(ratios.median()) > sound:
            row, column = divmod(int(ratios.argmin()), ratios.shape[1])
            where = f"row {row}" if what == "rows" else f"row {row}, group {column}"
            return (
                f"{count} of {ratios.numel()} {what} are unlike the source's, the worst has "
                f"{float(ratios.min()):.1f} dB ({where}), the median {float(ratios.median()):.1f}"
            )
    return None


def _decibels(target: torch.Tensor, cross: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """SQNR of every cell; infinite where it is too faint to judge."""
    import torch

    noise = (target - 2 * cross + actual).clamp_min(target * 1e-7)
    significant = target > _SIGNIFICANT * target.mean()
    return torch.where(significant, 10 * torch.log10(target / noise), torch.inf)


def _rows_and_cells(
    sums: Sums, bits: int, unclipped: Sums | None = None
) -> tuple[_Off | None, _Off | None]:
    """The rows and the cells that are off."""
    cells = (sums.target, sums.cross, sums.actual)
    whole = (cells[0].sum(1, True), cells[1].sum(1, True), cells[2].sum(1, True))
    gains: list[torch.Tensor | None] = [None, None]
    if unclipped is not None:
        inside = (unclipped.target, unclipped.cross)
        gains = [_gain(inside[0].sum(1, True), inside[1].sum(1, True)), _gain(*inside)]
    return (
        _off(whole, _ROW_TOLERANCE[bits], gain_inside=gains[0]),
        _off(cells, _CELL_TOLERANCE[bits], gain_inside=gains[1]),
    )


def _gain(target: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """cross / target; infinite where there is nothing to compare."""
    import torch

    return torch.where(target > 0, cross / target, torch.inf)


def overall_gain(sums: Sums) -> float | None:
    """The one factor by which the whole layer is off, None when it is not a scaled copy."""
    target, cross, actual = (
        float(t.double().sum()) for t in (sums.target, sums.cross, sums.actual)
    )
    if target <= 0 or actual <= 0 or cross * cross < _ALIGNED * target * actual:
        return None
    return cross / target


@dataclass(frozen=True)
class _Off:
    """Cells whose gain is off: how many, the worst one's gain and place."""

    count: int
    gain: float
    row: int
    column: int


def _say(off: _Off, what: str, of: int, where: str) -> str:
    return (
        f"{off.count} of {of} {what} are off, the worst is {off.gain:.2f} × what the source has "
        f"({where})"
    )


def _off(
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tolerance: float,
    aligned: float = _ALIGNED,
    gain_inside: torch.Tensor | None = None,
) -> _Off | None:
    """The cells that are scaled copies of their target, by another factor than 1."""
    import torch

    target, cross, actual = sums
    significant = target > _SIGNIFICANT * target.mean()
    gain = torch.where(significant, cross / target, 1.0)
    copies = cross * cross >= aligned * target * actual
    distance = torch.where(significant & copies, (gain - 1).abs(), 0.0)
    if gain_inside is not None:
        distance = torch.where((gain_inside - 1).abs() > tolerance, distance, 0.0)
    off = distance > tolerance
    if not bool(off.any()):
        return None
    row, column = divmod(int(distance.argmax()), target.shape[1])
    return _Off(int(off.sum()), float(gain[row, column]), row, column)
