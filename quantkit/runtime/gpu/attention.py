"""Attention of one new position a sequence over a static cache, for a captured decode step.

The position is read from the device, so that one captured launch serves every step. Keys are taken
in parts of `PART` positions or more by separate programs; a second kernel joins what they found
(Flash-Decoding, https://pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.runtime.gpu.early import early, let_next_start, wait_for_previous

PART = 256
MOST_PARTS = 32
_BLOCK = 64


@triton.jit
def _store_new(
    qkv, cos, sin, position, padding, queries, keys, values, capacity, key_scale, value_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, FP8: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    one = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(position)
    k = tl.arange(0, D // 2)
    at = qkv + (one * (HEADS + 2 * KV_HEADS) + head) * D + k
    first = tl.load(at).to(tl.float32)
    second = tl.load(at + D // 2).to(tl.float32)
    if head < HEADS + KV_HEADS:
        place = slot - tl.load(padding + one)
        c = tl.load(cos + place * (D // 2) + k).to(tl.float32)
        s = tl.load(sin + place * (D // 2) + k).to(tl.float32)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    kind = queries.dtype.element_ty
    first = first.to(kind).to(tl.float32)
    second = second.to(kind).to(tl.float32)
    if head < HEADS:
        to = queries + (one * HEADS + head) * D + k
    else:
        if head < HEADS + KV_HEADS:
            to = keys + ((one * KV_HEADS + head - HEADS) * capacity + slot) * D + k
            scale = key_scale
        else:
            to = values + ((one * KV_HEADS + head - HEADS - KV_HEADS) * capacity + slot) * D + k
            scale = value_scale
        if FP8:
            low = tl.minimum(tl.maximum(first / scale, -448.0), 448.0).to(tl.float8e4nv)
            high = tl.minimum(tl.maximum(second / scale, -448.0), 448.0).to(tl.float8e4nv)
            first = low.to(tl.float32) * scale
            second = high.to(tl.float32) * scale
    tl.store(to, first.to(kind))
    tl.store(to + D // 2, second.to(kind))


@triton.jit
def _part(
    queries, keys, values, position, padding, found, weights, y, capacity, factor, part_length,
    KV_HEADS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    one = tl.program_id(0)
    part = tl.program_id(1)
    start = part * part_length
    end = tl.minimum(start + part_length, tl.load(position) + 1)
    begin = tl.load(padding + one // KV_HEADS)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    asked = row < SHARED
    head = one * SHARED + row
    q = tl.load(queries + head[:, None] * D + d[None, :], asked[:, None], other=0.0)
    base = one.to(tl.int64) * capacity * D
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, D), tl.float32)
    for at in range(start, end, BLOCK):
        place = at + tl.arange(0, BLOCK)
        seen = (place < end) & (place >= begin)
        offsets = base + place[:, None] * D + d[None, :]
        k = tl.load(keys + offsets, seen[:, None], other=0.0)
        v = tl.load(values + offsets, seen[:, None], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * factor, -1e30)
        new = tl.maximum(largest, tl.max(scores, 1))
        p = tl.where(seen[None, :], tl.exp2(scores - new[:, None]), 0.0)
        decay = tl.exp2(largest - new)
        total = total * decay + tl.sum(p, 1)
        result = result * decay[:, None] + tl.dot(p.to(v.dtype), v)
        largest = new
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    if PARTS == 1:
        to = y + head[:, None] * D + d[None, :]
        tl.store(to, result.to(y.dtype.element_ty), asked[:, None])
        return
    to = (head * PARTS + part).to(tl.int64)
    tl.store(found + to[:, None] * D + d[None, :], result, asked[:, None])
    weight = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), -1e30)
    tl.store(weights + to, weight, asked)


@triton.jit
def _join(
    found, weights, y, D: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    d = tl.arange(0, D)
    w = tl.load(weights + head * PARTS + part)
    w = tl.exp2(w - tl.max(w, 0))
    w = w / tl.sum(w, 0)
    values = tl.load(found + (head * PARTS + part)[:, None] * D + d[None, :])
    tl.store(y + head * D + d, tl.sum(values * w[:, None], 0).to(y.dtype.element_ty))


def store_new(
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    position: torch.Tensor,
    padding: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scales: tuple[float, float] | None,
) -> torch.Tensor:
    """Turn a new position's queries and keys and write keys and values at `position`.

    qkv [batch, (heads + 2 kv_heads) × head_dim]; tables of cosines and sines [n, 1, head_dim / 2];
    position int32 [1]; padding int32 [batch], the positions before a sequence begins; keys and
    values [batch, kv_heads, capacity, head_dim], through FP8 of `scales`. Returns the queries
    [batch, heads, head_dim].
    """
    batch, kv_heads, capacity, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv_heads
    queries = qkv.new_empty(batch, heads, width)
    soon = early(qkv.device)
    _store_new[(batch, heads + 2 * kv_heads)](
        qkv, *tables, position, padding, queries, keys, values, capacity,
        *(scales or (1.0, 1.0)), heads, kv_heads, width, scales is not None,
        soon, num_warps=1, launch_pdl=soon,
    )  # fmt: skip
    return queries


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    padding: torch.Tensor,
) -> torch.Tensor:
    """softmax(q k / sqrt(head_dim)) v over the positions from `padding` to `position`.

    Shapes as in `store_new`; [batch, heads × head_dim].
    """
    batch, heads, width = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    parts = min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(capacity, PART)))
    length = triton.cdiv(triton.cdiv(capacity, parts), _BLOCK) * _BLOCK
    found = torch.empty(batch, heads, parts, width, dtype=torch.float32, device=queries.device)
    weights = torch.empty(batch, heads, parts, dtype=torch.float32, device=queries.device)
    shared = heads // kv_heads
    soon = early(queries.device)
    y = queries.new_empty(batch, heads * width)
    _part[(batch * kv_heads, parts)](
        queries, keys, values, position, padding, found, weights, y, capacity,
        width**-0.5 * 1.4426950408889634, length, kv_heads, shared,
        max(16, triton.next_power_of_2(shared)), width, parts, _BLOCK,
        soon, num_warps=4, launch_pdl=soon,
    )  # fmt: skip
    if parts > 1:
        _join[(batch * heads,)](found, weights, y, width, parts, soon, num_warps=2, launch_pdl=soon)
    return y
