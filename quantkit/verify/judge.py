"""When the sums of a comparison mean damage: SQNR under the floor, or single scales off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.schemes import Scheme
from quantkit.verify.fidelity import Sums

if TYPE_CHECKING:
    import torch

KEPT_FLOOR_DB = 40.0
"""SQNR under which a rescaled 16-bit weight is not the source's (BF16 rounding leaves 50 dB)."""

_TOLERANCE = {16: 0.05, 8: 0.15, 4: 0.35, 3: 0.5, 2: 0.8}
"""Bits → how far a cell's gain may be from 1. Rounding alone stays within half of it for cells of
16 weights and more."""

_COLUMN_TOLERANCE = 0.3
_ALIGNED = 0.85
"""cos² between target and actual above which a cell is a scaled copy of what it should be."""

_SIGNIFICANT = 0.02
"""Share of the mean energy under which a cell is too faint to judge."""


def floor_db(scheme: Scheme | None) -> float:
    """The SQNR floor of a scheme (None: a kept weight that a fold rescaled)."""
    return KEPT_FLOOR_DB if scheme is None else scheme.sqnr_floor_db


def faults(sums: Sums, scheme: Scheme | None) -> list[str]:
    """What is wrong with single cells or columns, in words; empty when nothing is."""
    tolerance = _TOLERANCE[16 if scheme is None else scheme.weight.bits]
    found = []
    cells = _off(sums.target, sums.cross, sums.actual, tolerance, _ALIGNED)
    if cells is not None:
        count, gain, (row, group) = cells
        where = f"row {row}" if sums.target.shape[1] == 1 else f"row {row}, group {group}"
        found.append(
            f"{count} of {sums.target.numel()} scales are off, the worst is {gain:.2f} × what the "
            f"source's weights need ({where})"
        )
    if sums.columns is not None:
        target, cross, actual = (column[None] for column in sums.columns)
        wide = max(tolerance, _COLUMN_TOLERANCE)
        columns = _off(target, cross, actual, wide, 0.9)
        if columns is not None:
            count, gain, (_, column) = columns
            found.append(
                f"{count} input channels are off, the worst is {gain:.2f} × what the source's "
                f"weights need (column {column})"
            )
    return found


def overall_gain(sums: Sums) -> float | None:
    """The one factor by which the whole layer is off, None when it is not a scaled copy."""
    target, cross, actual = (
        float(t.double().sum()) for t in (sums.target, sums.cross, sums.actual)
    )
    if target <= 0 or actual <= 0 or cross * cross < _ALIGNED * target * actual:
        return None
    return cross / target


def _off(
    target: torch.Tensor,
    cross: torch.Tensor,
    actual: torch.Tensor,
    tolerance: float,
    aligned: float,
) -> tuple[int, float, tuple[int, int]] | None:
    """How many cells have a wrong scale, the worst one's gain and place; None for no cell."""
    import torch

    significant = target > _SIGNIFICANT * target.mean()
    gain = torch.where(significant, cross / target, 1.0)
    copies = cross * cross >= aligned * target * actual
    off = significant & copies & ((gain - 1).abs() > tolerance)
    count = int(off.sum())
    if not count:
        return None
    distance = torch.where(off, (gain - 1).abs(), 0.0)
    at = int(distance.argmax())
    return count, float(gain.flatten()[at]), divmod(at, target.shape[1])
