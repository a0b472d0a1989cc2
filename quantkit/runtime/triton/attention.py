"""Attention of one new position a sequence over a static cache, for a captured decode step.

One kernel turns the new queries and keys, writes keys and values to the cache and attends. The
position is read from the device, so that one captured launch serves every step. Keys are taken in
parts by separate programs, and the last of a head to end joins what they found (Flash-Decoding,
https://pytorch.org/blog/flash-decoding). What the cache held before is read while the kernel
that computes the new position is still at work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.runtime.triton.dependent_launch import early, let_next_start, wait_for_previous

BLOCK = 128
MOST_PARTS = 32


@triton.jit
def _turned(at, cos, sin, place, d, mask, D: tl.constexpr, KIND: tl.constexpr):
    """A head's rotary embedding at a place, rounded to `KIND`, in float32."""
    own = tl.load(at, mask, other=0.0).to(tl.float32)
    other = tl.load(at + tl.where(d < D // 2, D // 2, -(D // 2)), mask, other=0.0).to(tl.float32)
    c = tl.load(cos + place * (D // 2) + d % (D // 2)).to(tl.float32)
    s = tl.load(sin + place * (D // 2) + d % (D // 2)).to(tl.float32)
    turned = own * c + tl.where(d < D // 2, -s, s) * other
    return turned.to(KIND).to(tl.float32)


@triton.jit
def _kept(x, scale, FP8: tl.constexpr):
    """x as the cache keeps it."""
    if FP8:
        codes = tl.minimum(tl.maximum(x / scale, -448.0), 448.0).to(tl.float8e4nv)
        x = codes.to(tl.float32) * scale
    return x


@triton.jit
def _attend(
    qkv, cos, sin, position, padding, keys, values, found, weights, arrived, y,
    capacity, factor, key_scale, value_scale,
    KV_HEADS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    PARTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    one = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    asked = row < SHARED
    sequence = (one // KV_HEADS).to(tl.int64)
    kind = y.dtype.element_ty
    slot = tl.load(position)
    begin = tl.load(padding + sequence)
    start = part * LENGTH
    end = tl.minimum(start + LENGTH, slot)
    base = one.to(tl.int64) * capacity * D
    place = start + tl.arange(0, BLOCK)
    seen = (place < end) & (place >= begin)
    offsets = base + place[:, None] * D + d[None, :]
    k = tl.load(keys + offsets, seen[:, None], other=0.0)
    v = tl.load(values + offsets, seen[:, None], other=0.0)
    wait_for_previous(EARLY)
    token = qkv + sequence * ((SHARED + 2) * KV_HEADS * D)
    head = (one % KV_HEADS) * SHARED + row
    turn = slot - begin
    at = token + head[:, None] * D + d[None, :]
    q = _turned(at, cos, sin, turn, d[None, :], asked[:, None], D, kind)
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, D), tl.float32)
    if part == slot // LENGTH:
        key = token + (SHARED * KV_HEADS + one % KV_HEADS) * D + d
        new_k = _kept(_turned(key, cos, sin, turn, d, d >= 0, D, kind), key_scale, FP8)
        new_v = _kept(tl.load(key + KV_HEADS * D).to(tl.float32), value_scale, FP8)
        new_k = new_k.to(kind)
        new_v = new_v.to(kind)
        tl.store(keys + base + slot * D + d, new_k)
        tl.store(values + base + slot * D + d, new_v)
        largest = tl.sum(q * new_k.to(tl.float32)[None, :], 1) * factor
        total += 1.0
        result += new_v.to(tl.float32)[None, :]
    q = q.to(kind)
    for at_key in range(start, end, BLOCK):
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * factor, -1e30)
        new = tl.maximum(largest, tl.max(scores, 1))
        p = tl.where(seen[None, :], tl.exp2(scores - new[:, None]), 0.0)
        decay = tl.exp2(largest - new)
        total = total * decay + tl.sum(p, 1)
        result = result * decay[:, None] + tl.dot(p.to(kind), v)
        largest = new
        if LENGTH > BLOCK:
            place = at_key + BLOCK + tl.arange(0, BLOCK)
            seen = (place < end) & (place >= begin)
            offsets = base + place[:, None] * D + d[None, :]
            k = tl.load(keys + offsets, seen[:, None], other=0.0)
            v = tl.load(values + offsets, seen[:, None], other=0.0)
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    line = one * SHARED + row
    own = line.to(tl.int64) * PARTS + part
    tl.store(found + own[:, None] * D + d[None, :], result, asked[:, None])
    weight = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), -1e30)
    tl.store(weights + own, weight, asked)
    tl.debug_barrier()
    if tl.atomic_add(arrived + one, 1, sem="acq_rel") == PARTS - 1:
        tl.debug_barrier()
        tl.store(arrived + one, 0)
        every = tl.arange(0, PARTS)
        for index in tl.static_range(SHARED):
            from_ = (one * SHARED + index).to(tl.int64) * PARTS + every
            w = tl.load(weights + from_, cache_modifier=".cg")
            w = tl.exp2(w - tl.max(w, 0))
            w = w / tl.sum(w, 0)
            parts = tl.load(found + from_[:, None] * D + d[None, :], cache_modifier=".cg")
            joined = tl.sum(parts * w[:, None], 0).to(kind)
            tl.store(y + (one * SHARED + index) * D + d, joined)


def attend_new(
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    position: torch.Tensor,
    padding: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scales: tuple[float, float] | None,
    arrived: torch.Tensor,
) -> torch.Tensor:
    """Write a new position to the cache; softmax(q k / sqrt(head_dim)) v over all that it sees.

    qkv [batch, (heads + 2 kv_heads) × head_dim] before the rotary embedding; tables of cosines and
    sines [n, 1, head_dim / 2]; position int32 [1], where the new keys go; padding int32 [batch],
    the positions before a sequence begins; keys and values [batch, kv_heads, capacity, head_dim],
    through FP8 of `scales`; arrived int32 [batch × kv_heads], zero before and after. Returns
    [batch, heads × head_dim].
    """
    batch, kv_heads, capacity, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv_heads
    shared = heads // kv_heads
    block = BLOCK if width <= 128 else BLOCK // 2
    parts = min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(capacity, block)))
    length = triton.cdiv(triton.cdiv(capacity, parts), block) * block
    found = torch.empty(batch, heads, parts, width, dtype=torch.float32, device=qkv.device)
    weights = torch.empty(batch, heads, parts, dtype=torch.float32, device=qkv.device)
    y = qkv.new_empty(batch, heads * width)
    soon = early(qkv.device)
    _attend[(batch * kv_heads, parts)](
        qkv, *tables, position, padding, keys, values, found, weights, arrived, y,
        capacity, width**-0.5 * 1.4426950408889634, *(scales or (1.0, 1.0)),
        kv_heads, shared, max(16, triton.next_power_of_2(shared)), width, parts, length, block,
        scales is not None, soon, num_warps=4, launch_pdl=soon,
    )  # fmt: skip
    return y
