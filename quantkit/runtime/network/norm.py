"""RMS normalisation; on a CPU in blocks of rows that stay in the cache."""

from __future__ import annotations

from functools import cache

import torch

from quantkit.runtime.vllm_ops.cpu import usable

_BLOCK_ELEMENTS = 1 << 17


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) × weight over the last dimension; the mean is float32.

    torch's own `rms_norm` of 16-bit numbers takes several times as long on a CPU.
    """
    width = x.shape[-1]
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, (width,), weight, eps)
    if usable(x):
        x = x.contiguous()
        normed = torch.empty_like(x)
        torch.ops._C.rms_norm.default(normed, x, weight, eps)
        return normed
    rows = x.reshape(-1, width)
    step = max(1, _BLOCK_ELEMENTS // width)
    if rows.shape[0] <= step:
        return _normalised(rows, weight, eps).view(x.shape)
    result = torch.empty_like(rows)
    for start in range(0, rows.shape[0], step):
        block = slice(start, start + step)
        result[block] = _normalised(rows[block], weight, eps)
    return result.view(x.shape)


def add_rms_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """x += added in place, and the `rms_norm` of the sum; `added` may be overwritten by it.

    Both [..., width] and contiguous.
    """
    if usable(x):
        torch.ops._C.fused_add_rms_norm.default(added, x, weight, eps)
        return added
    x += added
    return rms_norm(x, weight, eps)


def _normalised(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = rows.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factor = torch.addcmul(_constant(eps), length, length, value=1 / rows.shape[-1]).rsqrt_()
    return wide.mul_(factor).to(rows.dtype).mul_(weight)


@cache
def _constant(value: float) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float32)
