"""Products of one or a few rows with packed weights: bound by memory, no tensor cores.

A program takes some rows of the weight over all columns; the 16 bytes that a thread loads at a time
lie in one group of any size that is supported, whose scale multiplies a partial sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.runtime.gpu.words import CELL, e2m1, integer, offset


@triton.jit
def _four_bits(
    x, words, scale, zero, factor, y, rows, cells, groups,
    GROUP: tl.constexpr, FLOATING: tl.constexpr, ZERO: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    one = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    word = tl.arange(0, BC * 4)
    there = row < rows
    total = tl.zeros((BN, BC), tl.float32)
    for start in range(0, cells, BC):
        at = start * 4 + word
        inside = at < cells * 4
        w = tl.load(
            words + row.to(tl.int64)[:, None] * (cells * 4) + at[None, :],
            there[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first",
        )  # fmt: skip
        left = tl.zeros((BN, BC * 4), tl.float32)
        right = tl.zeros((BN, BC * 4), tl.float32)
        plain = tl.zeros((BC * 4,), tl.float32)
        shifted = tl.zeros((BC * 4,), tl.float32)
        for nibble in tl.static_range(8):
            column = at // 4 * 32 + 4 * nibble + at % 4
            v = tl.load(x + one * (cells * 32) + column, inside, other=0.0).to(tl.float32)
            if FLOATING:
                v *= 18446744073709551616.0
                if GROUP == 16 and nibble >= 4:
                    right += e2m1(w, nibble) * v[None, :]
                else:
                    left += e2m1(w, nibble) * v[None, :]
            else:
                left += integer(w, nibble) * v[None, :]
                plain += v
                shifted += v * offset(nibble)
        cell = start + tl.arange(0, BC)
        known = there[:, None] & (cell < cells)[None, :]
        place = row.to(tl.int64)[:, None] * groups
        sums = tl.sum(tl.reshape(left, (BN, BC, 4)), 2)
        if GROUP == 16:
            two = tl.load(scale + place + cell[None, :] * 2 + 1, known, other=0.0).to(tl.float32)
            total += tl.sum(tl.reshape(right, (BN, BC, 4)), 2) * two
            s = tl.load(scale + place + cell[None, :] * 2, known, other=0.0).to(tl.float32)
        else:
            place = place + (cell * 32 // GROUP)[None, :]
            s = tl.load(scale + place, known, other=0.0).to(tl.float32)
        if not FLOATING:
            plain_sums = tl.sum(tl.reshape(plain, (BC, 4)), 1)[None, :]
            sums -= tl.sum(tl.reshape(shifted, (BC, 4)), 1)[None, :]
            if zero is None:
                sums -= plain_sums * ZERO
            else:
                sums -= plain_sums * tl.load(zero + place, known, other=0.0).to(tl.float32)
        total += sums * s
    result = tl.sum(total, 1)
    if FLOATING:
        result *= 4611686018427387904.0
    if factor is not None:
        result *= tl.load(factor)
    tl.store(y + one.to(tl.int64) * rows + row, result.to(y.dtype.element_ty), there)


@triton.jit
def _eight_bits(
    x, x_scale, w, scale, zero, y, rows, chunks, groups, x_groups,
    GROUP: tl.constexpr, HEIGHT: tl.constexpr, X_GROUP: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    one = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    there = row < rows
    column = tl.arange(0, BC * 16)
    total = tl.zeros((BN, BC), tl.float32)
    for start in range(0, chunks, BC):
        k = start * 16 + column
        inside = k < chunks * 16
        v = tl.load(x + one * (chunks * 16) + k, inside, other=0.0).to(tl.float32)
        codes = tl.load(
            w + row.to(tl.int64)[:, None] * (chunks * 16) + k[None, :],
            there[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first",
        )  # fmt: skip
        sums = tl.sum(tl.reshape(codes.to(tl.float32) * v[None, :], (BN, BC, 16)), 2)
        chunk = start + tl.arange(0, BC)
        if GROUP > 0:
            known = there[:, None] & (chunk < chunks)[None, :]
            place = (row // HEIGHT)[:, None] * groups + (chunk * 16 // GROUP)[None, :]
            if zero is not None:
                plain = tl.sum(tl.reshape(v, (BC, 16)), 1)[None, :]
                sums -= plain * tl.load(zero + place, known, other=0.0).to(tl.float32)
            sums *= tl.load(scale + place, known, other=0.0).to(tl.float32)
        if X_GROUP > 0:
            at = x_scale + one * x_groups + chunk * 16 // X_GROUP
            sums *= tl.load(at, chunk < chunks, other=0.0)[None, :]
        total += sums
    result = tl.sum(total, 1)
    if GROUP == 0:
        result *= tl.load(scale + row, there, other=0.0).to(tl.float32)
    if X_GROUP < 0:
        result *= tl.load(x_scale + one)
    tl.store(y + one.to(tl.int64) * rows + row, result.to(y.dtype.element_ty), there)


def four_bits(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    group: int,
    floating: bool,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [m, in] @ W.T for words of `words.pack_words`, [m, out] in the dtype of x.

    scale and zero [out, in / group], group 16 (FP4 alone) or a multiple of 32; without `zero`
    integer codes are relative to 8. `factor` [1], float32, multiplies the result.
    """
    rows, cells = words.shape[0], words.shape[1] // 4
    y = x.new_empty(x.shape[0], rows)
    tall, wide, warps = _four_bit_blocks(rows, cells)
    _four_bits[(x.shape[0], triton.cdiv(rows, tall))](
        x, words, scale, zero, factor, y, rows, cells, scale.shape[1],
        group, floating, 8.0, tall, wide, num_warps=warps,
    )  # fmt: skip
    return y


def _four_bit_blocks(rows: int, cells: int) -> tuple[int, int, int]:
    """Rows and cells of a program, and its warps."""
    return 8, min(128, triton.next_power_of_2(cells)), 4


def eight_bits(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    group: int = 0,
    height: int = 1,
    x_group: int = 0,
) -> torch.Tensor:
    """(x × x_scale) @ (w × scale).T, [m, out] in `dtype`; in is a multiple of 16.

    x [m, in] is 16-bit or quantized, w [out, in] int8 or FP8. `scale` is [out], or with `group` a
    grid [out / height, in / group]; `x_scale` [m] where `x_group` is -1, else [m, in / x_group].
    """
    rows, chunks = w.shape[0], w.shape[1] // 16
    y = torch.empty(x.shape[0], rows, dtype=dtype, device=x.device)
    tall, wide, warps = _eight_bit_blocks(rows, chunks)
    _eight_bits[(x.shape[0], triton.cdiv(rows, tall))](
        x, x_scale, w, scale, zero, y, rows, chunks,
        scale.shape[1] if group else 0, x_scale.shape[1] if x_scale is not None and x_group > 0 else 0,
        group, height, x_group, tall, wide, num_warps=warps,
    )  # fmt: skip
    return y


def _eight_bit_blocks(rows: int, chunks: int) -> tuple[int, int, int]:
    """Rows and chunks of 16 columns of a program, and its warps."""
    return 4, min(128, triton.next_power_of_2(chunks)), 4


assert CELL == 32
