"""Attention of the lean decoder: torch's own, and on a CPU what is faster there."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

FEWEST_ROWS = 64
"""Texts from so many tokens on take `_in_blocks` on a CPU."""

_BLOCK_ROWS = 128


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
) -> torch.Tensor:
    """Queries [batch, heads, n, d] over keys and values [batch, kv_heads, all, d] → as queries.

    `mask` is boolean [batch, 1, n, all], None where `causal` (or nothing) says enough.
    """
    shared = queries.shape[1] != keys.shape[1]
    if queries.device.type == "cpu":
        if queries.shape[2] == 1 and shared:
            return _one_token(queries, keys, values, mask)
        if causal and queries.shape[2] >= FEWEST_ROWS and queries.dtype == torch.bfloat16:
            return _in_blocks(queries, keys, values)
    return scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=shared
    )


def _one_token(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The heads of one key take the place of a text's positions, so that torch reads each key once.

    Alone they take six times as long.
    """
    batch, _, _, width = queries.shape
    together = queries.reshape(batch, keys.shape[1], -1, width)
    attended = scaled_dot_product_attention(together, keys, values, attn_mask=mask)
    return attended.reshape(queries.shape)


def _in_blocks(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention from the first position on, as products of matrices.

    A block of queries meets the keys up to its end, the heads of one key at once. oneDNN's bfloat16
    product is about twice as fast as torch's fused attention without AMX; scores are rounded to
    bfloat16, as Transformers' eager attention rounds them.
    """
    batch, heads, count, width = queries.shape
    kv_heads = keys.shape[1]
    grouped = (queries * width**-0.5).view(batch, kv_heads, -1, count, width)
    result = torch.empty_like(queries, memory_format=torch.contiguous_format)
    hidden = torch.full((_BLOCK_ROWS, _BLOCK_ROWS), -torch.inf, dtype=queries.dtype).triu_(1)
    for text in range(batch):
        turned = keys[text].transpose(1, 2)
        for start in range(0, count, _BLOCK_ROWS):
            end = min(start + _BLOCK_ROWS, count)
            rows = end - start
            block = grouped[text, :, :, start:end].reshape(kv_heads, -1, width)
            scores = torch.bmm(block, turned[:, :, :end]).view(heads, rows, end)
            scores[:, :, start:] += hidden[:rows, :rows]
            weights = scores.softmax(-1).view(kv_heads, -1, end)
            attended = torch.bmm(weights, values[text, :, :end])
            result[text, :, start:end] = attended.view(heads, rows, width)
    return result
