"""NVFP4 and MXFP4 on a GPU without FP4 tensor cores: exact products in bfloat16, in Triton.

Activations, where the scheme quantizes them, are rounded to FP4 by a kernel of their own; an E2M1
number times an E4M3 or power-of-two group scale is exact in bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.kernels.base import no_gpu, no_triton, not_bfloat16
from quantkit.runtime.layer import Layer

NAME = "fp4_triton"
FEW_ROWS = 4
_CELL = 32


class Packed(NamedTuple):
    """`words` int32 [out, in / 8]; `scale` [out, in / group] in E4M3 or bfloat16.

    `factor` float32 [1] is the product of the global scales; `input_group` 0: a 16-bit input.
    """

    words: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor | None
    group: int
    input_group: int
    input_scale: torch.Tensor | None


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device, (8, 9)) or no_triton()


def rejects(layer: Layer) -> str | None:
    """See `Kernel.rejects`."""
    weight, activation = layer.scheme.weight, layer.scheme.input
    if weight.element != "fp4_e2m1" or (weight.group_size, weight.scale) not in _FORMATS:
        return "computes NVFP4 and MXFP4 weights"
    if activation is not None and (
        activation.element != "fp4_e2m1" or activation.scale != weight.scale
    ):
        return (
            f"computes 16-bit activations or such of the weights' format, not {activation.element}"
        )
    if layer.shape[1] % _CELL:
        return f"needs a multiple of 32 inputs, not {layer.shape[1]}"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: Layer) -> Packed:
    """See `Kernel.prepare`."""
    from quantkit.runtime.gpu.words import pack_words

    activation = layer.scheme.input
    factors = [weight.global_scale, weight.input_scale if activation else None]
    factor = torch.ones(1, dtype=torch.float64, device=weight.q.device)
    for one in factors:
        factor = factor if one is None else factor * one.double().reshape(1)
    stored = torch.float8_e4m3fn if weight.format.scale == "e4m3" else torch.bfloat16
    assert weight.format.group_size
    return Packed(
        pack_words(weight.q),
        weight.scale.to(stored).contiguous(),
        factor.float() if any(one is not None for one in factors) else None,
        weight.format.group_size,
        (activation.group_size or 0) if activation else 0,
        weight.input_scale.reshape(1).float() if weight.input_scale is not None else None,
    )


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.gpu import matrix, quantize, vector

    x = x.contiguous()
    if packed.input_group:
        x = quantize.round_four_bits(x, packed.input_group, packed.input_scale)
    if x.shape[0] <= FEW_ROWS:
        return vector.four_bits(
            x, packed.words, packed.scale, None,
            group=packed.group, floating=True, factor=packed.factor,
        )  # fmt: skip
    return matrix.multiply(
        x, packed.words, packed.scale, None,
        bits=4, group=packed.group, floating=True, factor=packed.factor,
    )  # fmt: skip


_FORMATS = frozenset({(16, "e4m3"), (32, "e8m0")})
