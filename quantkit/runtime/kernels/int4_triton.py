"""INT4 weights with 16-bit activations on a GPU in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.kernels.base import no_gpu, no_triton, not_bfloat16
from quantkit.runtime.layer import Layer

NAME = "int4_triton"
FEW_ROWS = 4
_CELL = 32


class Packed(NamedTuple):
    """`words` int32 [out, in / 8] (`gpu.words`); `scale` bfloat16 and `zero` [out, in / group]."""

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: int


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device) or no_triton()


def rejects(layer: Layer) -> str | None:
    """See `Kernel.rejects`."""
    weight = layer.scheme.weight
    if weight.element != "int4" or layer.scheme.input is not None:
        return "computes INT4 weights with 16-bit activations"
    if weight.granularity not in ("channel", "group"):
        return f"needs one weight scale a group or channel, not a {weight.granularity}"
    columns = layer.shape[1]
    size = weight.group_size or columns
    if size % _CELL or columns % size:
        return f"needs groups of a multiple of 32 that divide the inputs, not {size} in {columns}"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: Layer) -> Packed:
    """See `Kernel.prepare`."""
    from quantkit.runtime.gpu.words import pack_words

    zero = None if weight.zero_point is None else (weight.zero_point + 8).contiguous()
    return Packed(
        pack_words((weight.q + 8).to(torch.uint8)),
        weight.scale.to(layer.dtype).contiguous(),
        zero,
        weight.format.group_size or layer.shape[1],
    )


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.gpu import matrix, vector

    x = x.contiguous()
    if x.shape[0] <= FEW_ROWS:
        return vector.four_bits(
            x, packed.words, packed.scale, packed.zero, group=packed.group, floating=False
        )
    return matrix.multiply(x, packed.words, packed.scale, packed.zero, bits=4, group=packed.group)
