"""INT4 weights with 16-bit activations on a GPU through torch's own `_weight_int4pack_mm`.

W = (q - 8) × scale + zero of unsigned codes, groups of 32, 64, 128 or 256 (ATen
`native/cuda/int4mm.cu`). Made for few rows: from some dozens on it is slower than bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import no_gpu, not_bfloat16

NAME = "int4_tinygemm"
_GROUPS = (256, 128, 64, 32)
_INNER_TILES = 8
_ROWS, _COLUMNS = 8, 16 * _INNER_TILES


class Packed(NamedTuple):
    """`weight` as torch packs it; `scale_zero` [in / group, out, 2] in bfloat16."""

    weight: torch.Tensor
    scale_zero: torch.Tensor
    group: int


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device)


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, (rows, columns) = layer.scheme.weight, layer.shape
    if weight.element != "int4" or layer.scheme.input is not None:
        return "computes INT4 weights with 16-bit activations"
    size = weight.group_size or columns
    if columns % size or not any(size % group == 0 for group in _GROUPS):
        return f"needs groups of a multiple of 32 that divide the inputs, not {size} in {columns}"
    if rows % _ROWS or columns % _COLUMNS:
        return f"needs multiples of 8 outputs and 128 inputs, not {rows} and {columns}"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    columns = layer.shape[1]
    size = weight.format.group_size or columns
    group = next(group for group in _GROUPS if size % group == 0)
    codes = (weight.q + 8).to(torch.uint8)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_TILES)
    repeats = size // group
    scale = weight.scale.repeat_interleave(repeats, dim=1)
    zero = torch.zeros_like(scale)
    if weight.zero_point is not None:
        zero = -weight.zero_point.repeat_interleave(repeats, dim=1) * scale
    pair = torch.stack((scale, zero), -1).transpose(0, 1)
    return Packed(packed, pair.to(layer.dtype).contiguous(), group)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    result: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
        x.contiguous(), packed.weight, packed.group, packed.scale_zero
    )
    return result
