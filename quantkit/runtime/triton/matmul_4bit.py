"""Products of many rows with packed weights: expanded into bfloat16 on the way to the tensor cores.

A few dozen rows take a kernel that expands a tile in registers and multiplies it at once; more
rows pay for writing the expanded weight out, and take the library's product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.runtime.triton.unpack import tile as four_bit_tile

FEW_ROWS = 64
EXPANDED_ROWS = 8192
"""Output rows of the weight that are expanded at a time."""


@triton.jit
def _eight_bit_tile(
    w, scale, zero, start_row, start, rows, columns, groups,
    GROUP: tl.constexpr, HEIGHT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Weights [BN, BK] in bfloat16; GROUP 0 leaves a channel's scale to the caller."""
    row = start_row + tl.arange(0, BN)
    column = start + tl.arange(0, BK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    values = tl.load(w + at, inside, other=0.0).to(tl.float32)
    if GROUP > 0:
        chunk = start + tl.arange(0, BK // 16) * 16
        there = (row < rows)[:, None] & (chunk < columns)[None, :]
        place = (row // HEIGHT)[:, None] * groups + (chunk // GROUP)[None, :]
        cells = tl.reshape(values, (BN, BK // 16, 16))
        if zero is not None:
            cells -= tl.load(zero + place, there, other=0.0).to(tl.float32)[:, :, None]
        cells *= tl.load(scale + place, there, other=0.0).to(tl.float32)[:, :, None]
        values = tl.reshape(cells, (BN, BK))
    return values.to(tl.bfloat16)


@triton.jit
def _tile(
    w, scale, zero, start_row, start, rows, columns, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, FLOATING: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    if BITS == 4:
        return four_bit_tile(
            w, scale, zero, start_row, start, rows, columns // 64, groups, GROUP, FLOATING, BN, BK
        )
    return _eight_bit_tile(
        w, scale, zero, start_row, start, rows, columns, groups, GROUP, HEIGHT, BN, BK
    )


@triton.jit
def _expand(
    w, scale, zero, out, first, rows, columns, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, FLOATING: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    start_row = first + tl.program_id(0) * BN
    row = start_row + tl.arange(0, BN)
    start = tl.program_id(1) * BK
    column = start + tl.arange(0, BK)
    values = _tile(
        w, scale, zero, start_row, start, rows, columns, groups,
        BITS, GROUP, HEIGHT, FLOATING, BN, BK,
    )  # fmt: skip
    at = (row - first).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, values, (row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _few_rows(
    x, w, scale, zero, outer, y, factor, count, rows, columns, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, FLOATING: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    one = tl.program_id(2) * BM + tl.arange(0, BM)
    steps = tl.cdiv(tl.cdiv(columns, BK), SPLIT)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(columns, BK))):
        column = step * BK + tl.arange(0, BK)
        inside = (one < count)[:, None] & (column < columns)[None, :]
        a = tl.load(x + one[:, None] * columns + column[None, :], inside, other=0.0)
        b = _tile(
            w, scale, zero, tl.program_id(0) * BN, step * BK, rows, columns, groups,
            BITS, GROUP, HEIGHT, FLOATING, BN, BK,
        )  # fmt: skip
        total = tl.dot(a.to(tl.bfloat16), tl.trans(b), total)
    if outer is not None:
        total *= tl.load(outer + row, row < rows, other=0.0).to(tl.float32)[None, :]
    total *= factor
    at = (part * count + one).to(tl.int64)[:, None] * rows + row[None, :]
    there = (one < count)[:, None] & (row < rows)[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), there)


def multiply(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    rows: int,
    *,
    bits: int,
    group: int,
    height: int = 1,
    floating: bool = False,
    factor: float = 1.0,
) -> torch.Tensor:
    """x [m, in] @ W.T × factor in bfloat16, [m, rows].

    `bits` 8: w int8 or FP8 [rows, in], scale and zero [rows / height, in / group], or with `group`
    0 scale [rows]. `bits` 4: words, scale and zero as `few_rows.few` takes them.
    """
    columns = x.shape[1]
    if x.shape[0] > FEW_ROWS:
        return _library(
            x, w, scale if group else scale.view(-1, 1), zero, rows, factor,
            (bits, group or columns, height, floating),
        )  # fmt: skip
    groups = scale.shape[1] if group else 0
    settings = (bits, group, height, floating)
    outer = None if group else scale
    tall = max(16, triton.next_power_of_2(x.shape[0]))
    wide, deep, split = _few_row_blocks(rows, columns)
    shape = (split, x.shape[0], rows) if split > 1 else (x.shape[0], rows)
    y = torch.empty(shape, dtype=torch.float32 if split > 1 else x.dtype, device=x.device)
    _few_rows[(triton.cdiv(rows, wide), split, 1)](
        x, w, scale, zero, outer, y, factor, x.shape[0], rows, columns, groups,
        *settings, split, tall, wide, deep, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y.sum(0).to(x.dtype) if split > 1 else y


def _few_row_blocks(rows: int, columns: int) -> tuple[int, int, int]:
    """Output rows and columns of a tile, and into how many parts the columns are split."""
    wide, deep = 64, 128
    tiles = triton.cdiv(rows, wide)
    split = 1
    while tiles * split < 256 and columns // (2 * split) >= 4 * deep:
        split *= 2
    return wide, deep, split


def _library(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    rows: int,
    factor: float,
    settings: tuple[int, int, int, bool],
) -> torch.Tensor:
    """The product with the weight expanded, some rows of it at a time."""
    columns = x.shape[1]
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    buffer = torch.empty(min(rows, EXPANDED_ROWS), columns, dtype=torch.bfloat16, device=x.device)
    for first in range(0, rows, EXPANDED_ROWS):
        out = y[:, first : first + EXPANDED_ROWS]
        count = out.shape[1]
        _expand[(triton.cdiv(count, 16), triton.cdiv(columns, 128))](
            w, scale, zero, buffer, first, first + count, columns, scale.shape[1],
            *settings, 16, 128, num_warps=4,
        )  # fmt: skip
        torch.addmm(out, x, buffer[:count].T, beta=0, alpha=factor, out=out)
    return y
