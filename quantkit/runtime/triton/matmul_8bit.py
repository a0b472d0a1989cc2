"""Matrix products of 8-bit operands with their scales applied on the way out.

INT8: exact sums, then a scale a row and a column. FP8 in blocks: every 128 columns' float32 sum is
multiplied by its scales before it is added (as DeepSeek-V3's report describes, section 3.3.2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP_M = 8
"""Tiles of rows that are computed beside each other, to meet each other's operands in the cache."""


@triton.jit
def _place(count, rows, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    program = tl.program_id(0)
    tall, wide = tl.cdiv(count, BM), tl.cdiv(rows, BN)
    band = program // (GROUP * wide)
    height = tl.minimum(tall - band * GROUP, GROUP)
    inside = program % (GROUP * wide)
    return band * GROUP + inside % height, inside // height


@triton.jit
def _int8(
    x, w, x_scale, w_scale, y, count, rows, columns,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    m, n = _place(count, rows, BM, BN, GROUP)
    total = tl.zeros((BM, BN), tl.int32)
    for k in range(0, columns, BK):
        a = x.load([m * BM, k])
        b = w.load([n * BN, k])
        total = tl.dot(a, b.T, total, out_dtype=tl.int32)
    one, row = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    result = total.to(tl.float32)
    if CHANNEL:
        result *= tl.load(w_scale + row, row < rows, other=0.0)[None, :]
    else:
        result *= tl.load(w_scale)
    if TOKEN:
        result *= tl.load(x_scale + one, one < count, other=0.0)[:, None]
    else:
        result *= tl.load(x_scale)
    at = one.to(tl.int64)[:, None] * rows + row[None, :]
    there = (one < count)[:, None] & (row < rows)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), there)


@triton.jit
def _fp8_blocks(
    x, w, x_scale, w_scale, y, count, rows, columns, groups,
    HEIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    m, n = _place(count, rows, BM, BN, GROUP)
    one, row = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, columns, BK):
        a = x.load([m * BM, k])
        b = w.load([n * BN, k])
        s = tl.load(x_scale + one * groups + k // BK, one < count, other=0.0)
        s *= tl.load(w_scale + n * BN // HEIGHT * groups + k // BK)
        total += tl.dot(a, b.T) * s[:, None]
    at = one.to(tl.int64)[:, None] * rows + row[None, :]
    there = (one < count)[:, None] & (row < rows)[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), there)


def int8(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int8 x [m, in] @ int8 w [out, in].T × x_scale [m or 1] × w_scale [out or 1], in `dtype`.

    in is a multiple of 16.
    """
    (count, columns), rows = x.shape, w.shape[0]
    y = torch.empty(count, rows, dtype=dtype, device=x.device)
    tall, wide, deep, warps, stages = _int8_blocks(count, rows)
    _int8[(triton.cdiv(count, tall) * triton.cdiv(rows, wide),)](
        _descriptor(x, tall, deep), _descriptor(w, wide, deep), x_scale, w_scale, y,
        count, rows, columns, x_scale.numel() > 1, w_scale.numel() > 1,
        tall, wide, deep, GROUP_M, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def fp8_blocks(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    height: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """FP8 x [m, in] @ w [out, in].T in `dtype`; x_scale [m, in / 128], w_scale [out / height,
    in / 128]. in is a multiple of 128, height of 64."""
    (count, columns), rows = x.shape, w.shape[0]
    y = torch.empty(count, rows, dtype=dtype, device=x.device)
    tall, wide = (128, 128) if count > 64 else (64, 64)
    if height % wide:
        wide = 64
    _fp8_blocks[(triton.cdiv(count, tall) * triton.cdiv(rows, wide),)](
        _descriptor(x, tall, 128), _descriptor(w, wide, 128), x_scale, w_scale, y,
        count, rows, columns, columns // 128, height, tall, wide, 128, GROUP_M,
        num_warps=4 if tall * wide < 16384 else 8, num_stages=4,
    )  # fmt: skip
    return y


def _int8_blocks(count: int, rows: int) -> tuple[int, int, int, int, int]:
    """Tile of rows, outputs and columns; warps; stages of the pipeline."""
    if count <= 64:
        return 64, 64, 128, 4, 4
    if triton.cdiv(count, 128) * triton.cdiv(rows, 256) < 100:
        return 128, 128, 128, 8, 4
    return 128, 256, 128, 8, 4


def _descriptor(matrix: torch.Tensor, tall: int, wide: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [tall, wide])
