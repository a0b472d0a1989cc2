"""FP8 weights in 128 × 128 blocks and activations in groups of 128, on a GPU in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import no_gpu, no_triton, not_bfloat16

NAME = "fp8_block_triton"
FEW_ROWS = 2
GROUP = 128


class Packed(NamedTuple):
    """`weight` FP8 [out, in]; `scale` float32 [out / 128, in / 128]; `powers`: whether the scales
    of the input are powers of two."""

    weight: torch.Tensor
    scale: torch.Tensor
    powers: bool


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device, (9, 0)) or no_triton()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, activation = layer.scheme.weight, layer.scheme.input
    if weight.element != "fp8_e4m3" or weight.granularity != "block" or activation is None:
        return "computes FP8 weights in blocks with FP8 activations"
    if weight.block != (GROUP, GROUP) or activation.group_size != GROUP:
        return f"needs blocks of 128 × 128 and groups of 128, not {weight.block}"
    if activation.element != "fp8_e4m3":
        return f"computes FP8 activations, not {activation.element}"
    if layer.shape[1] % GROUP:
        return f"needs a multiple of 128 inputs, not {layer.shape[1]}"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    assert layer.scheme.input is not None
    powers = layer.scheme.input.scale == "e8m0"
    return Packed(weight.q.contiguous(), weight.scale.float().contiguous(), powers)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.triton import matmul_8bit, matvec_8bit, quantize

    codes, scale = quantize.by_group(x.contiguous(), GROUP, powers=packed.powers)
    if x.shape[0] <= FEW_ROWS:
        return matvec_8bit.eight_bits(
            codes, scale, packed.weight, packed.scale, None,
            dtype=x.dtype, group=GROUP, height=GROUP, x_group=GROUP,
        )  # fmt: skip
    return matmul_8bit.fp8_blocks(
        codes, packed.weight, scale, packed.scale, height=GROUP, dtype=x.dtype
    )
