"""FP8 weights and activations on a GPU through torch's `_scaled_mm` (cuBLASLt, CUTLASS).

One scale a tensor, or one a token and an output channel. The tensor cores work on tiles of many
rows: one or two rows take a kernel that only reads the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import no_gpu, no_triton, not_bfloat16

NAME = "fp8_scaled_mm"
FEW_ROWS = 2
SOME_ROWS = 64
"""Up to so many rows one scale a tensor is faster, and the others are multiplied in afterwards."""

_ALIGNMENT = 16


class Packed(NamedTuple):
    """`weight` FP8 [out, in]; scales are float32.

    `channel` [out]; `tensor` [1] where weight and input have one scale each; `one` is 1.
    `input_scale` is the static one; `whole_input` says that a dynamic one is of the whole input.
    """

    weight: torch.Tensor
    channel: torch.Tensor
    tensor: torch.Tensor | None
    one: torch.Tensor
    input_scale: torch.Tensor | None
    whole_input: bool


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device, (8, 9)) or no_triton()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, activation = layer.scheme.weight, layer.scheme.input
    if weight.element != "fp8_e4m3" or activation is None or activation.element != "fp8_e4m3":
        return "computes FP8 weights with FP8 activations"
    if weight.granularity not in ("tensor", "channel"):
        return f"needs one weight scale a tensor or channel, not a {weight.granularity}"
    if activation.granularity not in ("tensor", "token"):
        return f"needs one activation scale a tensor or token, not a {activation.granularity}"
    if any(size % _ALIGNMENT for size in layer.shape):
        return (
            f"needs multiples of 16 inputs and outputs, not {layer.shape[1]} and {layer.shape[0]}"
        )
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    assert layer.scheme.input is not None
    scale = weight.scale.reshape(-1).float()
    whole = layer.scheme.input.granularity == "tensor"
    return Packed(
        weight.q.contiguous(),
        scale.expand(layer.shape[0]).contiguous(),
        scale if whole and scale.numel() == 1 else None,
        scale.new_ones(()),
        None if weight.input_scale is None else weight.input_scale.reshape(1).float(),
        whole,
    )


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.triton import elementwise, matvec_8bit, quantize

    rows, scale = x.shape[0], packed.input_scale
    if scale is None and packed.whole_input:
        scale = quantize.tensor_scale(x)
    codes, scale = quantize.by_row(x.contiguous(), torch.float8_e4m3fn, scale)
    if rows <= FEW_ROWS:
        scale = scale.expand(rows).contiguous()
        return matvec_8bit.eight_bits(
            codes, scale, packed.weight, packed.channel, None, dtype=x.dtype, x_group=-1
        )
    if packed.tensor is not None:
        return _multiply(codes, packed.weight, scale, packed.tensor, x.dtype)
    scale = scale.expand(rows).contiguous()
    if rows <= SOME_ROWS:
        sums = _multiply(codes, packed.weight, packed.one, packed.one, torch.float32)
        return elementwise.scale(sums, scale, packed.channel, x.dtype)
    return _multiply(codes, packed.weight, scale.view(-1, 1), packed.channel.view(1, -1), x.dtype)


def _multiply(
    codes: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    result: torch.Tensor = torch._scaled_mm(
        codes, weight.T, scale, weight_scale, out_dtype=dtype, use_fast_accum=True
    )
    return result
