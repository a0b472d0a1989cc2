"""Products of one or a few rows with 8-bit weights: bound by memory, no tensor cores.

A program takes some rows of the weight over all columns; the 16 bytes that a thread loads at a time
lie in one group of any size that is supported, whose scale multiplies a partial sum. The next bytes
are on their way while one is multiplied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.runtime.triton.dependent_launch import early, let_next_start, wait_for_previous


@triton.jit
def _eight_bits(
    x, x_scale, w, scale, zero, y, rows, chunks, groups, x_groups,
    GROUP: tl.constexpr, HEIGHT: tl.constexpr, X_GROUP: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    one = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (row < rows)[:, None]
    column = tl.arange(0, BC * 16)
    first = w + row.to(tl.int64)[:, None] * (chunks * 16) + column[None, :]
    ahead = tl.load(first, there & (column < chunks * 16)[None, :], other=0.0)
    total = tl.zeros((BN, BC), tl.float32)
    wait_for_previous(EARLY)
    for start in range(0, chunks, BC):
        codes = ahead.to(tl.float32)
        later = (start + BC) * 16
        ahead = tl.load(first + later, there & (column < chunks * 16 - later)[None, :], other=0.0)
        k = start * 16 + column
        v = tl.load(x + one * (chunks * 16) + k, k < chunks * 16, other=0.0).to(tl.float32)
        sums = tl.sum(tl.reshape(codes * v[None, :], (BN, BC, 16)), 2)
        chunk = start + tl.arange(0, BC)
        if GROUP > 0:
            known = there & (chunk < chunks)[None, :]
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
        result *= tl.load(scale + row, row < rows, other=0.0).to(tl.float32)
    if X_GROUP < 0:
        result *= tl.load(x_scale + one)
    tl.store(y + one.to(tl.int64) * rows + row, result.to(y.dtype.element_ty), row < rows)


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
    tall, wide, warps = eight_bit_blocks(chunks, w.dtype)
    soon = early(x.device)
    groups = scale.shape[1] if group else 0
    x_groups = x_scale.shape[1] if x_scale is not None and x_group > 0 else 0
    _eight_bits[(x.shape[0], triton.cdiv(rows, tall))](
        x, x_scale, w, scale, zero, y, rows, chunks, groups, x_groups,
        group, height, x_group, tall, wide, soon, num_warps=warps, launch_pdl=soon,
    )  # fmt: skip
    return y


def eight_bit_blocks(chunks: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and chunks of 16 columns of a program, and its warps (measured on an H100)."""
    warps = 4 if dtype == torch.int8 else 2
    return 4, min(32 * warps, triton.next_power_of_2(chunks)), warps
