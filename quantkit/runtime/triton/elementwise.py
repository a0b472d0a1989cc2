"""What lies between the products of a layer, one kernel where torch has several."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.runtime.triton.dependent_launch import early, let_next_start, wait_for_previous


@triton.jit
def _silu_mul(
    gate_up, y, width, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * width + k, k < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + k, k < width, other=0.0).to(tl.float32)
    turned = (gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + k, (turned * up).to(y.dtype.element_ty), k < width)


@triton.jit
def _add_norm(
    x, delta, weight, y, width, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    v = tl.load(x + row * width + k, k < width, other=0.0).to(tl.float32)
    v += tl.load(delta + row * width + k, k < width, other=0.0).to(tl.float32)
    kept = v.to(x.dtype.element_ty)
    tl.store(x + row * width + k, kept, k < width)
    v = kept.to(tl.float32)
    factor = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    w = tl.load(weight + k, k < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + k, (v * factor * w).to(y.dtype.element_ty), k < width)


@triton.jit
def _rotate(
    x, cos, sin, y, heads, half, tokens, row_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, HALF)
    table = (row % tokens) * half + k
    c = tl.load(cos + table, k < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + table, k < half, other=0.0).to(tl.float32)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (k < half)[None, :]
    at = head * 2 * half + k[None, :]
    first = tl.load(x + row * row_stride + at, inside, other=0.0).to(tl.float32)
    second = tl.load(x + row * row_stride + at + half, inside, other=0.0).to(tl.float32)
    to = y + row * heads * 2 * half + at
    tl.store(to, (first * c - second * s).to(y.dtype.element_ty), inside)
    tl.store(to + half, (second * c + first * s).to(y.dtype.element_ty), inside)


@triton.jit
def _scale(x, row_scale, column_scale, y, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + row * width + k, k < width, other=0.0)
    v *= tl.load(row_scale + row) * tl.load(column_scale + k, k < width, other=0.0)
    tl.store(y + row * width + k, v.to(y.dtype.element_ty), k < width)


def scale(
    x: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """float32 x [m, n] × row_scale [m] × column_scale [n], in `dtype`."""
    y = torch.empty_like(x, dtype=dtype)
    width = x.shape[1]
    soon = early(x.device)
    _scale[(x.shape[0], triton.cdiv(width, 1024))](
        x, row_scale, column_scale, y, width, 1024, soon, launch_pdl=soon
    )
    return y


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) × second half of [..., 2 width], contiguous."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    soon = early(y.device)
    _silu_mul[(y.numel() // width, triton.cdiv(width, 2048))](
        gate_up, y, width, 2048, soon, launch_pdl=soon
    )
    return y


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """x += delta in place; then x / sqrt(mean(x²) + eps) × weight, [m, width]."""
    y = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    soon = early(x.device)
    _add_norm[(x.numel() // width,)](
        x, delta, weight, y, width, eps, block, soon,
        num_warps=min(16, max(1, block // 512)), launch_pdl=soon,
    )  # fmt: skip
    return y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotary.rotate` of x [batch, n, heads, head_dim], whose heads lie beside each other.

    cos and sin [n, 1, head_dim / 2], or [batch, n, 1, head_dim / 2].
    """
    batch, count, heads, width = x.shape
    assert x.stride(0) == count * x.stride(1) or batch == 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = width // 2
    soon = early(x.device)
    _rotate[(batch * count,)](
        x, cos, sin, y, heads, half, cos.numel() // half, x.stride(1),
        triton.next_power_of_2(heads), triton.next_power_of_2(half), soon, launch_pdl=soon,
    )  # fmt: skip
    return y
