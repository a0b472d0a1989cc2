"""Experts in 4 bits with 16-bit activations by Marlin, as vLLM compiles it for mixtures.

`moe_wna16_marlin_gemm` (vLLM, csrc/moe/marlin_moe_wna16) reads for every block of rows the weight
of their expert, in the arrangement that `marlin_gemm` has for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from quantkit.runtime.linear.grouped.base import Activation, alike
from quantkit.runtime.linear.kernels import marlin_vllm
from quantkit.runtime.linear.kernels.base import no_gpu
from quantkit.runtime.linear.kernels.marlin_vllm import Packed
from quantkit.runtime.linear.modules import QuantLinear
from quantkit.runtime.vllm_ops import cuda as vllm_cuda_operators

NAME = "marlin_moe_vllm"
_BLOCKS = (8, 16, 32, 48, 64)
_FULL = 0.9
"""A block of rows is taken that the rows of an expert do not fill, as vLLM has it."""


class _Blocks(NamedTuple):
    """Rows by expert, each expert's padded to whole blocks: what `moe_align_block_size` gives."""

    rows: torch.Tensor
    experts: torch.Tensor
    used: torch.Tensor
    size: int


def unavailable(device: torch.device) -> str | None:
    """See `GroupedKernel.unavailable`."""
    return no_gpu(device) or vllm_cuda_operators.missing_for_experts()


def rejects(layers: Sequence[nn.Module]) -> str | None:
    """See `GroupedKernel.rejects`."""
    reason = alike(layers, marlin_vllm.NAME)
    if reason is not None:
        return reason
    quantized = [layer for layer in layers if isinstance(layer, QuantLinear)]
    if any(layer.layer.scheme.weight.element == "int8" for layer in quantized):
        return "computes 4 bits: with 8 the operator of vLLM 0.26 did not return"
    packed = [layer.packed for layer in quantized]
    kinds = {(one.kind, one.words.shape, one.scale.shape, one.zero is None) for one in packed}
    return None if len(kinds) == 1 else "needs experts of one scheme and shape"


def prepare(layers: Sequence[nn.Module]) -> Packed:
    """See `GroupedKernel.prepare`: that of one expert, with the experts before its dimensions."""
    packed = [layer.packed for layer in layers if isinstance(layer, QuantLinear)]
    first: Packed = packed[0]
    count = torch.cuda.get_device_properties(first.words.device).multi_processor_count
    return first._replace(
        words=torch.stack([one.words for one in packed]),
        scale=torch.stack([one.scale for one in packed]),
        outer=None if first.outer is None else torch.cat([one.outer.reshape(1) for one in packed]),
        zero=None if first.zero is None else torch.stack([one.zero for one in packed]),
        workspace=torch.zeros(4 * count, dtype=torch.int32, device=first.words.device),
    )


def apply(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    layers: tuple[Packed, Packed],
    activation: Activation,
) -> torch.Tensor:
    """See `GroupedKernel.apply`."""
    up, down = layers
    tokens, k = chosen.shape
    blocks = _blocks(chosen.int().contiguous(), len(up.words))
    weights = weights.float().contiguous()
    first = _multiply(hidden.contiguous(), up, blocks, weights, k, weighted=False)
    middle = activation(first).contiguous()
    second = _multiply(middle, down, blocks, weights, 1, weighted=True)
    return second.view(tokens, k, -1).sum(1)


def _blocks(chosen: torch.Tensor, count: int) -> _Blocks:
    """int32 [tokens, k] → the rows of each of `count` experts."""
    taken = chosen.numel()
    size = next((one for one in _BLOCKS if taken / count / one < _FULL), _BLOCKS[-1])
    most = min(taken * size, taken + count * (size - 1)) if taken < count else (
        taken + count * (size - 1)
    )  # fmt: skip
    rows = chosen.new_empty(most)
    experts = chosen.new_empty(-(-most // size))
    used = chosen.new_empty(1)
    vllm_cuda_operators.call(
        "moe_align_block_size", topk_ids=chosen, num_experts=count,
        block_size=size, sorted_token_ids=rows, experts_ids=experts, num_tokens_post_pad=used,
        maybe_expert_map=None, scatter_idx=None,
    )  # fmt: skip
    return _Blocks(rows, experts, used, size)


def _multiply(
    x: torch.Tensor,
    layer: Packed,
    blocks: _Blocks,
    weights: torch.Tensor,
    k: int,
    *,
    weighted: bool,
) -> torch.Tensor:
    """x [n, in], each row for k experts → [n × k, out]."""
    result: torch.Tensor = vllm_cuda_operators.call(
        "moe_wna16_marlin_gemm", a=x, c_or_none=None, b_q_weight=layer.words,
        b_bias_or_none=None, b_scales=layer.scale, a_scales=None,
        global_scale=layer.outer, b_zeros_or_none=layer.zero,
        g_idx_or_none=None, perm_or_none=None, workspace=layer.workspace,
        sorted_token_ids=blocks.rows, expert_ids=blocks.experts,
        num_tokens_past_padded=blocks.used, topk_weights=weights, moe_block_size=blocks.size,
        top_k=k, mul_topk_weights=weighted, b_type_id=layer.kind,
        size_m=len(x), size_n=layer.rows, size_k=x.shape[1], is_full_k=True, is_k_full=True,
        use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False,
        thread_k=-1, thread_n=-1, blocks_per_sm=-1,
    )  # fmt: skip
    return result
