"""A quantized weight in about its stored size, expanded row by row when a product needs it.

Codes of 4 bits or fewer stay packed. A byte is decoded by one look-up in a table that holds the
values of all codes in it: on a CPU this is several times faster than shifts, masks and casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import E2M1_VALUES
from quantkit.formats.packing import pack_words, unpack_words

BLOCK_ELEMENTS = 1 << 20
"""Weights expanded at a time: 2 MiB in bfloat16, what a core's second-level cache holds."""

_AS_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class CompactWeight:
    """W = inner × outer, where inner = (code - zero) × group or block scale, in `dtype`.

    codes: packed bytes [out, in × bits / 8], int32 words (3 bits) or int8 [out, in].
    table: [256 × codes a byte], the values of each byte; None where codes are cast or unpacked.
    zero, inner: in `dtype`, on the grid of group or block scales.
    outer: float32 [out] or [1], the scale of channel or tensor times the global scale.
    cell: (rows, columns) that share one entry of the grid.
    """

    columns: int
    dtype: torch.dtype
    bits: int
    codes: torch.Tensor
    table: torch.Tensor | None
    zero: torch.Tensor | None
    inner: torch.Tensor | None
    outer: torch.Tensor
    cell: tuple[int, int]

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Every block of rows, with its inner values [rows, in] in `dtype`."""
        step = max(self.cell[0], BLOCK_ELEMENTS // self.columns // self.cell[0] * self.cell[0])
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            yield rows, self._expand(rows)

    def _expand(self, rows: slice) -> torch.Tensor:
        codes = self.codes[rows]
        if self.table is not None:
            values = _look_up(self.table, codes)[:, : self.columns]
        elif self.bits == 3:
            values = unpack_words(codes, 3, self.columns).to(self.dtype)
        else:
            values = codes.to(self.dtype)
        if self.zero is not None:
            values = self._on_grid(torch.sub, values, self.zero, rows)
        if self.inner is not None:
            values = self._on_grid(torch.mul, values, self.inner, rows)
        return values

    def _on_grid(
        self, operation: _Operation, values: torch.Tensor, grid: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        height, width = self.cell
        part = grid[rows.start // height : -(-rows.stop // height)] if grid.shape[0] > 1 else grid
        if height > 1:
            part = part.repeat_interleave(height, dim=0)[: values.shape[0]]
        if part.shape[1] == 1:
            return operation(values, part)
        if self.columns % width:
            wide = part.repeat_interleave(width, dim=1)[:, : self.columns]
            return operation(values, wide)
        cells = values.reshape(values.shape[0], -1, width)
        return operation(cells, part.unsqueeze(-1)).flatten(1)


def compact(weight: QuantWeight, dtype: torch.dtype) -> CompactWeight:
    """Pack a weight without g_idx, as `layer.centred` leaves it; values are made in `dtype`.

    Codes and their zero points are exact in bfloat16, and so are NVFP4 and MX codes times their
    group scales; other group and block scales are rounded to `dtype`, as engines do.
    """
    number = weight.format
    by_output = number.granularity in ("tensor", "channel")
    outer = weight.scale.reshape(-1) if by_output else weight.scale.new_ones(1)
    if weight.global_scale is not None:
        outer = (outer.double() * weight.global_scale.double()).float()
    codes, table, offset = _pack(weight, dtype)
    zero = None if weight.zero_point is None else (weight.zero_point + offset).to(dtype)
    if offset and zero is None:
        zero = torch.full((1, 1), offset, dtype=dtype, device=codes.device)
    width = number.group_size or weight.q.shape[1]
    return CompactWeight(
        columns=weight.q.shape[1],
        dtype=dtype,
        bits=number.bits,
        codes=codes,
        table=table,
        zero=zero,
        inner=None if by_output else weight.scale.to(dtype),
        outer=outer,
        cell=number.block if number.block is not None else (1, width),
    )


def _pack(weight: QuantWeight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Codes as they are kept, the table that decodes them, and what is left to subtract."""
    number, q = weight.format, weight.q
    if number.element == "fp8_e4m3":
        return q.view(torch.uint8), _fp8_table(dtype).to(q.device), 0
    if number.bits == 8:
        return q, None, 0
    values = torch.tensor(E2M1_VALUES)
    unsigned = q
    half = 1 << (number.bits - 1)
    if number.is_int:
        unsigned = (q + half).view(torch.uint8)
        values = torch.arange(-half, half, dtype=torch.float32)
    words = pack_words(unsigned, number.bits)
    if number.bits == 3:
        return words, None, half
    return words.view(torch.uint8), _byte_table(values, number.bits).to(q.device, dtype), 0


def fp8_values(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float8_e4m3fn [rows, n] in another dtype; torch's cast takes seven times as long on a CPU."""
    if codes.device.type != "cpu":
        return codes.to(dtype)
    return _look_up(_fp8_table(dtype), codes.view(torch.uint8))


@cache
def _fp8_table(dtype: torch.dtype) -> torch.Tensor:
    """[256]: the value of every E4M3 code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)


def _byte_table(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[256 × codes a byte]: the values of each byte's codes, the lowest bits first."""
    every = torch.arange(256).unsqueeze(1)
    shifts = torch.arange(0, 8, bits)
    return values[(every >> shifts) & ((1 << bits) - 1)].flatten()


def _look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The values of bytes [rows, n], as [rows, n × codes a byte]."""
    entry = table.numel() // 256 * table.element_size()
    index = codes.flatten().int()
    if entry in _AS_INTEGER:
        found = table.view(_AS_INTEGER[entry]).index_select(0, index).view(table.dtype)
    else:
        found = table.view(256, -1).index_select(0, index)
    return found.view(codes.shape[0], -1)
