"""NVFP4 and MXFP4 on a GPU without FP4 tensor cores: exact products in bfloat16, in Triton.

Activations, where the scheme quantizes them, are rounded to FP4 by a kernel of their own; an E2M1
number times an E4M3 or power-of-two group scale is exact in bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import FP4_FORMATS, no_gluon, no_gpu, not_bfloat16

NAME = "fp4_triton"
FEW_ROWS = 32
_COLUMNS = 64


class Packed(NamedTuple):
    """`words` and `scale` (E4M3 or bfloat16) as `gpu.few_rows.few` takes them; `rows` is out.

    `factor` is the product of the global scales; `input_group` 0: a 16-bit input.
    """

    words: torch.Tensor
    scale: torch.Tensor
    factor: float
    group: int
    rows: int
    input_group: int
    input_scale: torch.Tensor | None


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device, (8, 9)) or no_gluon()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, activation = layer.scheme.weight, layer.scheme.input
    if weight.element != "fp4_e2m1" or (weight.group_size, weight.scale) not in FP4_FORMATS:
        return "computes NVFP4 and MXFP4 weights"
    if activation is not None and (
        activation.element != "fp4_e2m1" or activation.scale != weight.scale
    ):
        return (
            f"computes 16-bit activations or such of the weights' format, not {activation.element}"
        )
    if layer.shape[1] % _COLUMNS:
        return f"needs a multiple of 64 inputs, not {layer.shape[1]}"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    from quantkit.runtime.triton.fragments import by_tile, fragments

    activation = layer.scheme.input
    factor = 1.0
    for one in (weight.global_scale, weight.input_scale if activation else None):
        factor *= 1.0 if one is None else float(one)
    stored = torch.float8_e4m3fn if weight.format.scale == "e4m3" else torch.bfloat16
    assert weight.format.group_size
    return Packed(
        fragments(weight.q, fine=weight.format.group_size == 16),
        by_tile(weight.scale).to(stored),
        factor,
        weight.format.group_size,
        layer.shape[0],
        (activation.group_size or 0) if activation else 0,
        weight.input_scale.reshape(1).float() if weight.input_scale is not None else None,
    )


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.triton import matmul_4bit, matmul_4bit_few_rows, quantize

    x = x.contiguous()
    if packed.input_group:
        x = quantize.round_four_bits(x, packed.input_group, packed.input_scale)
    if x.shape[0] <= FEW_ROWS:
        return matmul_4bit_few_rows.few(
            x, packed.words, packed.scale, None, packed.rows,
            group=packed.group, floating=True, factor=packed.factor,
        )  # fmt: skip
    return matmul_4bit.multiply(
        x, packed.words, packed.scale, None, packed.rows,
        bits=4, group=packed.group, floating=True, factor=packed.factor,
    )  # fmt: skip
