"""Attention of the lean decoder: torch's own, and on a CPU what is faster there."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from quantkit.backends.process.float32_products import slow_bfloat16

FEWEST_ROWS = 64
"""Texts from so many tokens on take `_in_blocks` on a CPU with fast bfloat16 products."""

_BLOCK_ROWS = 128


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
) -> torch.Tensor:
    """Queries [batch, heads, n, d] over keys and values [batch, kv_heads, all, d] →
    [batch, n, heads × d].

    `mask` is boolean [batch, 1, n, all], None where `causal` (or nothing) says enough.
    """
    shared = queries.shape[1] != keys.shape[1]
    if queries.device.type == "cpu":
        if queries.shape[2] == 1 and keys.stride(3) != 1:
            return _one_token_turned(queries, keys, values, mask)
        if queries.shape[2] == 1 and shared:
            return _one_token(queries, keys, values, mask)
        blocks = causal and queries.shape[2] >= FEWEST_ROWS and queries.dtype == torch.bfloat16
        if blocks and not slow_bfloat16():
            return _in_blocks(queries, keys, values)
    attended = scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=shared
    )
    return attended.transpose(1, 2).flatten(2)


def _one_token(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The heads of one key take the place of a text's positions, so that torch reads each key once.

    Alone they take six times as long.
    """
    batch, _, _, width = queries.shape
    together = queries.reshape(batch, keys.shape[1], -1, width)
    attended = scaled_dot_product_attention(together, keys, values, attn_mask=mask)
    return attended.reshape(batch, 1, -1)


def _one_token_turned(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The same over keys that lie turned, which torch's own attention would copy.

    Scores are rounded to the dtype, as in `_in_blocks`.
    """
    batch, _, _, width = queries.shape
    together = queries.reshape(batch, keys.shape[1], -1, width) * width**-0.5
    scores = torch.matmul(together, keys.transpose(2, 3))
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    attended = torch.matmul(scores.softmax(-1), values)
    return attended.reshape(batch, 1, -1)


def _in_blocks(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention from the first position on, as products of matrices.

    A block of queries meets the keys up to its end, the heads of one key at once. oneDNN's bfloat16
    product is about twice as fast as torch's fused attention without AMX; scores are rounded to
    bfloat16, as Transformers' eager attention rounds them.
    """
    batch, heads, count, width = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    of_key = queries.view(batch, kv_heads, group, count, width).transpose(2, 3)
    scaled = queries.new_empty(batch, kv_heads, count, group, width)
    torch.mul(of_key, width**-0.5, out=scaled)
    result = queries.new_empty(batch, count, kv_heads, group, width)
    hidden = torch.full((_BLOCK_ROWS, _BLOCK_ROWS), -torch.inf, dtype=queries.dtype).triu_(1)
    for text in range(batch):
        turned = keys[text].transpose(1, 2)
        for start in range(0, count, _BLOCK_ROWS):
            end = min(start + _BLOCK_ROWS, count)
            rows = end - start
            block = scaled[text, :, start:end].flatten(1, 2)
            scores = torch.bmm(block, turned[:, :, :end])
            scores.view(kv_heads, rows, group, end)[..., start:] += hidden[:rows, None, :rows]
            attended = torch.bmm(scores.softmax(-1), values[text, :, :end])
            result[text, start:end] = attended.view(kv_heads, rows, group, width).transpose(0, 1)
    return result.flatten(2)
