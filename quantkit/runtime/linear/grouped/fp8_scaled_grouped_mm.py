"""Experts in FP8, activations too, by torch's `_scaled_grouped_mm` (CUTLASS).

One scale a token and an output channel; scales of whole tensors are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from quantkit.runtime.linear.grouped.base import Activation, Sorted, alike, one_after_the_other
from quantkit.runtime.linear.kernels import cutlass_vllm, fp8_scaled_mm
from quantkit.runtime.linear.kernels.base import no_gpu, no_triton
from quantkit.runtime.linear.modules import QuantLinear

NAME = "fp8_scaled_grouped_mm"
_SINGLE = (cutlass_vllm.NAME, fp8_scaled_mm.NAME)
"""Kernels of one matrix whose arrangement is stacked here."""


class Packed(NamedTuple):
    """`weight` FP8 [experts, out, in]; `scale` float32 [experts, out]; `input_scale` float32
    [experts], where it is static."""

    weight: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None


def unavailable(device: torch.device) -> str | None:
    """See `GroupedKernel.unavailable`."""
    return no_gpu(device, (9, 0)) or no_triton()


def rejects(layers: Sequence[nn.Module]) -> str | None:
    """See `GroupedKernel.rejects`."""
    reasons = [alike(layers, kernel) for kernel in _SINGLE]
    if all(reasons):
        return reasons[0]
    packed = [layer.packed for layer in layers if isinstance(layer, QuantLinear)]
    if packed[0].weight.dtype != torch.float8_e4m3fn:
        return "computes FP8"
    if len({one.weight.shape for one in packed}) > 1:
        return "needs experts of one shape"
    if packed[0].whole_input and packed[0].input_scale is None:
        return "needs one activation scale a token, or static ones"
    return None


def prepare(layers: Sequence[nn.Module]) -> Packed:
    """See `GroupedKernel.prepare`."""
    packed = [layer.packed for layer in layers if isinstance(layer, QuantLinear)]
    single = isinstance(packed[0], fp8_scaled_mm.Packed)
    static = [one.input_scale for one in packed if one.input_scale is not None]
    return Packed(
        torch.stack([one.weight for one in packed]),
        torch.stack([one.channel if single else one.scale for one in packed]),
        torch.cat(static) if static else None,
    )


def apply(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    layers: tuple[Packed, Packed],
    activation: Activation,
) -> torch.Tensor:
    """See `GroupedKernel.apply`."""
    products = (partial(_multiply, layers[0]), partial(_multiply, layers[1]))
    count = len(layers[0].weight)
    return one_after_the_other(hidden, chosen, weights, count, products, activation)


def _multiply(layer: Packed, x: torch.Tensor, rows: Sorted) -> torch.Tensor:
    from quantkit.runtime.triton import quantize

    if layer.input_scale is None:
        codes, scale = quantize.by_row(x, torch.float8_e4m3fn, None)
        scale = scale.expand(len(x)).contiguous()
    else:
        scale = layer.input_scale.index_select(0, rows.experts)
        scaled = x.float() / scale.unsqueeze(-1)
        codes = scaled.clamp_(-448, 448).to(torch.float8_e4m3fn)
    product: torch.Tensor = torch._scaled_grouped_mm(
        codes, layer.weight.transpose(-2, -1), scale, layer.scale, offs=rows.ends,
        out_dtype=x.dtype, use_fast_accum=True,
    )  # fmt: skip
    return product
