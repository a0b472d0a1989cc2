"""Activations quantized in one kernel, by the rules of `quantkit.runtime.linear.activations`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.runtime.triton.dependent_launch import early, let_next_start, wait_for_previous

ONE_BLOCK = 16384
"""Rows of up to so many columns are read once; wider ones a second time."""


@triton.jit
def _rounded(values, TOP: tl.constexpr, INTEGER: tl.constexpr):
    """Clamped, and for integers rounded to the nearest even: 1.5 × 2^23 leaves no fraction."""
    if INTEGER:
        values = (values + 12582912.0) - 12582912.0
        return tl.minimum(tl.maximum(values, -TOP - 1), TOP)
    return tl.minimum(tl.maximum(values, -TOP), TOP)


@triton.jit
def _rows(
    x, codes, scale, columns, LEAST: tl.constexpr, TOP: tl.constexpr, INTEGER: tl.constexpr,
    STATIC: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row = tl.program_id(0)
    at = row.to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    if STATIC:
        s = tl.load(scale)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            k = start + column
            v = tl.load(x + at + k, k < columns, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(v))
        s = tl.maximum(tl.max(largest, 0) / TOP, LEAST)
        tl.store(scale + row, s)
    inverse = 1.0 / s
    for start in range(0, columns, BLOCK):
        k = start + column
        v = tl.load(x + at + k, k < columns, other=0.0).to(tl.float32)
        q = _rounded(v * inverse, TOP, INTEGER)
        tl.store(codes + at + k, q.to(codes.dtype.element_ty), k < columns)


@triton.jit
def _groups(
    x, codes, scale, count,
    GROUP: tl.constexpr, LEAST: tl.constexpr, POWERS: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = group.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = group < count
    v = tl.load(x + at, there[:, None], other=0.0).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(v), 1) / 448.0, LEAST)
    if POWERS:  # a mantissa that is not zero carries into the exponent
        bits = (s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        s = bits.to(tl.float32, bitcast=True)
    q = _rounded(v * (1.0 / s)[:, None], 448.0, False)
    tl.store(codes + at, q.to(tl.float8e4nv), there[:, None])
    tl.store(scale + group, s, there)


@triton.jit
def _round_e2m1(values):
    size = tl.abs(values)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    inverse = tl.where(size < 2.0, 2.0, tl.where(size < 4.0, 1.0, 0.5))
    return ((values * inverse + 12582912.0) - 12582912.0) * step


@triton.jit
def _four_bit_groups(
    x, y, outer, count,
    GROUP: tl.constexpr, TWO_LEVELS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = group.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = group < count
    v = tl.load(x + at, there[:, None], other=0.0).to(tl.float32)
    if TWO_LEVELS:
        v = tl.math.div_rn(v, tl.load(outer))
        largest = tl.max(tl.abs(v), 1)
        stored = tl.minimum(tl.math.div_rn(largest, 6.0), 448.0).to(tl.float8e4nv)
        s = stored.to(tl.float32)
        scaled = tl.math.div_rn(v, tl.where(s == 0.0, float("inf"), s)[:, None])
    else:
        bits = tl.max(tl.abs(v), 1).to(tl.int32, bitcast=True)
        power = tl.maximum(((bits + 0x200000) >> 23) - 2, 0)
        s = tl.where(power == 0, 0x400000, power << 23).to(tl.float32, bitcast=True)
        scaled = v * ((254 - power) << 23).to(tl.float32, bitcast=True)[:, None]
    scaled = tl.minimum(tl.maximum(scaled, -6.0), 6.0)
    tl.store(y + at, (_round_e2m1(scaled) * s[:, None]).to(y.dtype.element_ty), there[:, None])


def tensor_scale(x: torch.Tensor) -> torch.Tensor:
    """The FP8 scale [1] of a whole tensor."""
    return (x.abs().amax().float() / 448.0).clamp_(min=1.0 / (448.0 * 512)).reshape(1)


def by_row(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [m, in] in int8 or float8_e4m3fn, and the scale: [m], or the static one given, [1]."""
    rows, columns = x.shape
    integer = dtype == torch.int8
    codes = torch.empty(rows, columns, dtype=dtype, device=x.device)
    static = scale is not None
    if scale is None:
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns) if columns <= ONE_BLOCK else 4096
    soon = early(x.device)
    least = torch.finfo(torch.float32).eps if integer else 1.0 / (448.0 * 512)
    _rows[(rows,)](
        x, codes, scale, columns, least, 127.0 if integer else 448.0, integer, static, block,
        soon, num_warps=min(16, max(1, block // 512)), launch_pdl=soon,
    )  # fmt: skip
    return codes, scale


def by_group(
    x: torch.Tensor, group: int, *, powers: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes [m, in] and scales [m, in / group]; the group, a power of two, divides in. With
    `powers` the scales are powers of two, none smaller than without."""
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[0], x.shape[1] // group, dtype=torch.float32, device=x.device)
    block = max(1, 4096 // group)
    soon = early(x.device)
    _groups[(triton.cdiv(scale.numel(), block),)](
        x, codes, scale, scale.numel(), group, 1.0 / (448.0 * 512), powers, block, soon,
        launch_pdl=soon,
    )  # fmt: skip
    return codes, scale


def round_four_bits(x: torch.Tensor, group: int, outer: torch.Tensor | None) -> torch.Tensor:
    """x rounded to NVFP4 (group 16, divided by `outer` [1]) or MXFP4 (group 32), in its dtype.

    What `activations.round_groups` makes; the group divides in.
    """
    y = torch.empty_like(x)
    count = x.numel() // group
    block = 2048 // group
    soon = early(x.device)
    _four_bit_groups[(triton.cdiv(count, block),)](
        x, y, outer, count, group, outer is not None, block, soon, launch_pdl=soon
    )
    return y
