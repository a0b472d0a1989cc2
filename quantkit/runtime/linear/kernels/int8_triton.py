"""INT8 weights and activations on a GPU in Triton: exact sums, scaled on the way out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import no_gpu, no_triton, not_bfloat16

NAME = "int8_triton"
FEW_ROWS = 2
_ALIGNMENT = 16


class Packed(NamedTuple):
    """`weight` int8 [out, in]; `scale` float32 [out]; `input_scale` [1], or None: one a token."""

    weight: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device, (9, 0)) or no_triton()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, activation = layer.scheme.weight, layer.scheme.input
    if weight.element != "int8" or activation is None or activation.element != "int8":
        return "computes INT8 weights with INT8 activations"
    if weight.granularity not in ("tensor", "channel"):
        return f"needs one weight scale a channel, not a {weight.granularity}"
    if activation.dynamic and activation.granularity != "token":
        return f"needs one activation scale a token, not a {activation.granularity}"
    if layer.has_zero_point or not activation.symmetric:
        return "needs symmetric weights and activations"
    if layer.shape[1] % _ALIGNMENT:
        return f"needs a multiple of 16 inputs, not {layer.shape[1]}"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:  # noqa: ARG001
    """See `Kernel.prepare`."""
    scale = weight.scale.reshape(-1).float().expand(weight.q.shape[0]).contiguous()
    static = None if weight.input_scale is None else weight.input_scale.reshape(1).float()
    return Packed(weight.q.contiguous(), scale, static)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.triton import matmul_8bit, matvec_8bit, quantize

    codes, scale = quantize.by_row(x.contiguous(), torch.int8, packed.input_scale)
    if x.shape[0] <= FEW_ROWS:
        return matvec_8bit.eight_bits(
            codes,
            scale.expand(x.shape[0]).contiguous(),
            packed.weight,
            packed.scale,
            None,
            dtype=x.dtype,
            x_group=-1,
        )
    return matmul_8bit.int8(codes, packed.weight, scale, packed.scale, x.dtype)
