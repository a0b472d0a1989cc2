"""How a slice is cut into blocks of rows, and how much memory a block takes (no torch)."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.backends.streaming.job import Layout, Slice, Work, entry_bytes
from quantkit.checkpoint.schemes import NumberFormat

BLOCK_ELEMENTS = {"cpu": 1 << 18}
"""Weights a block: on a CPU the float32 copies of one fit a core's second-level cache."""

_ELSEWHERE = 1 << 24

ROW_MULTIPLE = 8
"""Blocks start at multiples of this: packed zero points hold eight rows a word."""

_BYTES_A_WEIGHT = 40
"""At work on a block: float32 copies, codes and scratch (measured)."""


def block_rows(part: Slice, number: NumberFormat | None, device: str) -> int:
    """Rows of a slice that are worked on at a time."""
    multiple = number.block[0] if number and number.block else ROW_MULTIPLE
    wanted = BLOCK_ELEMENTS.get(device, _ELSEWHERE) // max(part.columns, 1)
    return max(multiple, wanted // multiple * multiple)


def blocks(part: Slice, number: NumberFormat | None, device: str) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) of a slice, in order."""
    step = block_rows(part, number, device)
    for start in range(0, part.rows, step):
        yield start, min(start + step, part.rows)


def working_bytes(work: Work, layout: Layout) -> int:
    """What a worker on a CPU holds at most while it does this work, its libraries aside."""
    if not work.pieces:
        return 4 << 20
    part = work.pieces[0].source
    needed = block_rows(part, work.pieces[0].scheme.weight, "cpu") * part.columns * _BYTES_A_WEIGHT
    if part.transposed:
        matrices = 2 if work.pieces[0].fused else 1  # measured for the global scale beside it
        needed += matrices * part.tensor.bytes // part.tensor.shape[0]
    if layout != "compressed-tensors":
        needed += sum(entry_bytes(*entry) for entry in work.outputs.values())
    return needed
