"""The linear layers of a loaded model: 16-bit, quantized, and several joined into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantkit.backends.process.float32_products import linear, slow_bfloat16
from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.select import Choice
from quantkit.runtime.vllm_ops import cpu as vllm_operators

WIDE_COLUMNS = 2048
FEW_ROWS = 32


class PlainLinear(nn.Module):
    """A 16-bit linear layer, weight [out, in].

    On a CPU a narrow weight is kept in oneDNN's own arrangement, by vLLM's operators where they are
    to be had: with few rows of input that takes half the time or less. From `WIDE_COLUMNS` on the
    gain is under a tenth.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.rows, columns = weight.shape
        self.prepacked = columns < WIDE_COLUMNS and _has_bfloat16_linear(weight)
        self.kept: vllm_operators.Weight | None = None
        if self.prepacked and vllm_operators.usable(weight):
            self.kept = vllm_operators.plain_weight(weight)
            weight = weight.new_empty(0)
        elif self.prepacked:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @property
    def outside_bytes(self) -> int:
        """What the weight takes where torch does not count it."""
        return self.kept.nbytes if self.kept else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is not None:
            result = x.new_empty(*x.shape[:-1], self.rows)
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            with vllm_operators.LOCK:
                torch.ops._C.onednn_mm(
                    result.view(-1, self.rows), rows, self.bias, self.kept.handle
                )
            return result
        if not self.prepacked:
            return linear(x, self.weight, self.bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "none", [], ""
        )
        return product


def _has_bfloat16_linear(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or slow_bfloat16():
        return False
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class QuantLinear(nn.Module):
    """A quantized linear layer, computed by one kernel.

    `order` is the order in which an act-order weight takes its input columns.
    """

    order: torch.Tensor | None
    multiplier: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        layer: LayerDescription,
        choice: Choice,
        weight: QuantWeight,
        order: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.choice = choice
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("multiplier", _cast(weight.input_multiplier, layer.dtype))
        self.register_buffer("bias", _cast(weight.bias, layer.dtype))
        self.packed: Any = choice.kernel.prepare(
            replace(weight, bias=None, input_multiplier=None), layer
        )
        if weight.q.is_cuda:  # kernels may read it before those ahead of them have ended
            torch.cuda.synchronize(weight.q.device)

    @property
    def outside_bytes(self) -> int:
        """What the weight takes where torch does not count it."""
        weight = getattr(self.packed, "weight", None)
        return weight.nbytes if isinstance(weight, vllm_operators.Weight) else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self.multiplier is not None:
            rows = rows * self.multiplier
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        result = self.choice.kernel.apply(rows, self.packed)
        if self.bias is not None:
            result += self.bias
        return result.view(*x.shape[:-1], result.shape[-1])


class JoinedLinear(nn.Module):
    """Layers of one input whose outputs are laid side by side."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def _cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)
