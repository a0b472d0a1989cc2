"""INT8 weights and activations on a CPU through vLLM's operators: both in two calls.

One quantizes the rows of the input, one multiplies and scales within oneDNN. With few rows, where
`int8_cpu` spends its time between small operations, this is several times as fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels import int8_cpu
from quantkit.runtime.linear.kernels.base import not_bfloat16
from quantkit.runtime.vllm_ops import cpu as vllm_operators

NAME = "int8_vllm"
BLOCK_ROWS = 512
"""Of wide layers oneDNN takes less time over such blocks than over thousands of rows at once."""


class Packed(NamedTuple):
    """`scale` [out] is the weight's."""

    weight: vllm_operators.Weight
    scale: torch.Tensor


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    if device.type != "cpu":
        return "runs on a CPU"
    return vllm_operators.missing() or int8_cpu.inexact()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    reason = int8_cpu.rejects(layer) or not_bfloat16(layer)
    if reason is None and layer.scheme.input is not None and not layer.scheme.input.dynamic:
        return "needs activation scales that are found while running"
    return reason


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:  # noqa: ARG001
    """See `Kernel.prepare`."""
    scale = weight.scale.float().expand(weight.q.shape[0], 1).reshape(-1).contiguous()
    return Packed(vllm_operators.int8_weight(weight.q.contiguous(), scale), scale)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    result = x.new_empty(x.shape[0], packed.scale.shape[0])
    if x.shape[0] <= BLOCK_ROWS:
        _multiply(x, packed, result)
    else:
        for start in range(0, x.shape[0], BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            _multiply(x[block], packed, result[block])
    return result


def _multiply(rows: torch.Tensor, packed: Packed, result: torch.Tensor) -> None:
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scale = torch.empty(rows.shape[0], 1)
    torch.ops._C.dynamic_scaled_int8_quant.default(codes, rows.contiguous(), scale, None)
    with vllm_operators.LOCK:
        torch.ops._C.onednn_scaled_mm.default(
            result, codes, scale, None, None, None, packed.weight.handle
        )
