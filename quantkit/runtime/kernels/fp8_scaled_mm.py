"""FP8 weights and activations on a GPU through torch's `_scaled_mm` (cuBLASLt, CUTLASS).

One scale a tensor, or one a token and an output channel. The tensor cores work on tiles of many
rows: one or two rows take a kernel that only reads the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.kernels.base import no_gpu, no_triton, not_bfloat16
from quantkit.runtime.layer import Layer

NAME = "fp8_scaled_mm"
FEW_ROWS = 2
_ALIGNMENT = 16


class Packed(NamedTuple):
    """`weight` FP8 [out, in]; `scale` float32 [1, out] or [1]; `few` [out], for few rows: times
    the static input scale, where there is one."""

    weight: torch.Tensor
    scale: torch.Tensor
    few: torch.Tensor
    input_scale: torch.Tensor | None
    one_input_scale: bool


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device, (8, 9)) or no_triton()


def rejects(layer: Layer) -> str | None:
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


def prepare(weight: QuantWeight, layer: Layer) -> Packed:
    """See `Kernel.prepare`."""
    assert layer.scheme.input is not None
    scale = weight.scale.reshape(-1).float()
    static = None if weight.input_scale is None else weight.input_scale.reshape(1).float()
    few = scale.expand(weight.q.shape[0]).contiguous()
    one_input_scale = layer.scheme.input.granularity == "tensor"
    if scale.numel() > 1 or not one_input_scale:
        scale = few.view(1, -1)
    return Packed(
        weight.q.contiguous(), scale, few if static is None else few * static, static,
        one_input_scale,
    )  # fmt: skip


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.gpu import quantize, vector

    scale = packed.input_scale
    if scale is None and packed.one_input_scale:
        scale = quantize.tensor_scale(x)
    codes, scale = quantize.by_row(x.contiguous(), torch.float8_e4m3fn, scale)
    if x.shape[0] <= FEW_ROWS and (packed.input_scale is not None or not packed.one_input_scale):
        static = packed.input_scale is not None
        return vector.eight_bits(
            codes, None if static else scale, packed.weight, packed.few, None,
            dtype=x.dtype, x_group=0 if static else -1,
        )  # fmt: skip
    if packed.scale.dim() == 2:
        scale = scale.view(-1, 1).expand(x.shape[0], 1).contiguous()
    result: torch.Tensor = torch._scaled_mm(
        codes, packed.weight.T, scale, packed.scale, out_dtype=x.dtype, use_fast_accum=True
    )
    return result
