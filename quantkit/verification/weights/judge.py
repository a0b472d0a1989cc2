"""When the sums of a comparison mean damage: SQNR under the floor, or single scales off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from quantkit.checkpoint.schemes import Scheme
from quantkit.verification.weights.compare import Sums

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

_SOUND_DB = {8: 25.0, 4: 15.0, 3: 9.0}
"""Bits → median SQNR over which a layer is sound as a whole; else single rows are not judged."""

_SUSPECT_DB = {8: 10.0, 4: 3.0, 3: 3.0}
"""Bits → SQNR under which a row is looked at. At 8 bits that alone condemns: real outputs have
21 dB and more. At fewer bits GPTQ trades a row's weights for its output (−7 dB were seen, in rows
that two implementations agree on), so that the row must also be another's or nobody's."""

_CHANCE = 4.0
"""Standard deviations (1 / √n for n numbers) up to which the cosine of unrelated rows may lie."""

_CHANCE_OF_CELLS = 2.0
"""The same for groups, of which GPTQ garbles some in part: one of forty lost groups goes unseen."""

_EXCHANGED = 0.7
"""Cosine with another row of the source from which a suspect row is that row."""

_MOST_SUSPECTS = 64
"""Rows compared with all others; the worst first."""

_CELL_DB = {8: 10.0, 4: 0.0, 3: 0.0}
"""Bits → SQNR under which a group is garbage where the rest of its row is sound."""

_REST_DB = {8: 17.0, 4: 10.0, 3: 10.0}
"""Bits → SQNR over which the rest of a row is sound."""

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


def garbled(
    sums: Sums,
    scheme: Scheme | None,
    width: int,
    others: Callable[[torch.Tensor], torch.Tensor],
) -> str | None:
    """Rows or groups that are not the source's in a layer that otherwise is like it, in words.

    `width` is the length of a row; `others` gives the largest cosine that each of some rows has
    with another row of the source, float32 [rows].
    """
    if scheme is None or scheme.weight.bits not in _SOUND_DB:
        return None
    bits = scheme.weight.bits
    cells = (sums.target, sums.cross, sums.actual)
    whole = (cells[0].sum(1, True), cells[1].sum(1, True), cells[2].sum(1, True))
    of_rows, of_cells = _decibels(*whole), _decibels(*cells)
    if float(of_rows.median()) <= _SOUND_DB[bits]:
        return None
    strange = _strange_rows(of_rows[:, 0], _cosine(*whole)[:, 0], bits, width, others)
    if bool(strange.any()):
        worst = int(of_rows[:, 0].where(strange, inf).argmin())
        return _unlike("rows", strange.unsqueeze(1), of_rows, f"row {worst}", worst)
    rest = tuple(one - part for one, part in zip(whole, cells, strict=True))
    rest_db = _decibels(rest[0], rest[1], rest[2])
    lost = (of_cells < _CELL_DB[bits]) & (rest_db > _REST_DB[bits])
    if bits < 8:
        lost &= _cosine(*cells) < _CHANCE_OF_CELLS / (width / cells[0].shape[1]) ** 0.5
        lost &= of_cells.median(0, keepdim=True).values > _SUSPECT_DB[bits]
    if cells[0].shape[1] > 1 and bool(lost.any()):
        flat = int(of_cells.where(lost, inf).argmin())
        row, column = divmod(flat, of_cells.shape[1])
        return _unlike("groups", lost, of_cells, f"row {row}, group {column}", flat)
    return None


def _strange_rows(
    decibels: torch.Tensor,
    cosine: torch.Tensor,
    bits: int,
    width: int,
    others: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Which rows are another row's, or no row's at all; bool [rows]."""
    suspects = decibels < _SUSPECT_DB[bits]
    if bits == 8 or not bool(suspects.any()):
        return suspects
    strange: torch.Tensor = suspects & (cosine < _CHANCE / width**0.5)
    indices = (suspects & ~strange).nonzero().flatten()
    indices = indices[cosine[indices].argsort()][:_MOST_SUSPECTS]
    if len(indices):
        best = others(indices)
        strange[indices] = (best > _EXCHANGED) & (best > cosine[indices])
    return strange


def _cosine(target: torch.Tensor, cross: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Of what a cell should be and what it is; 0 for a cell of zeros."""
    lengths: torch.Tensor = (target * actual).sqrt().clamp_min(1e-30)
    return cross / lengths


def _unlike(what: str, which: torch.Tensor, decibels: torch.Tensor, where: str, worst: int) -> str:
    return (
        f"{int(which.sum())} of {which.numel()} {what} are not the source's, the worst has "
        f"{float(decibels.flatten()[worst]):.1f} dB ({where}), the median "
        f"{float(decibels.median()):.1f}"
    )


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
