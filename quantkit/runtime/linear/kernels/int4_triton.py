"""INT4 weights with 16-bit activations on a GPU in Triton: tensor cores fed from packed weights."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import no_gluon, no_gpu, not_bfloat16

NAME = "int4_triton"
FEW_ROWS = 32
_COLUMNS = 64
_CELL = 32


class Packed(NamedTuple):
    """As `gpu.few_rows.few` takes them; `rows` is out."""

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: int
    rows: int


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device) or no_gluon()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, columns = layer.scheme.weight, layer.shape[1]
    if weight.element != "int4" or layer.scheme.input is not None:
        return "computes INT4 weights with 16-bit activations"
    if weight.granularity not in ("channel", "group"):
        return f"needs one weight scale a group or channel, not a {weight.granularity}"
    if columns % _COLUMNS:
        return f"needs a multiple of 64 inputs, not {columns}"
    size = weight.group_size or columns
    if size % _CELL or columns % size:
        return f"needs groups of a multiple of 32 that divide the inputs, not {size} in {columns}"
    if not layer.whole_zero_points:
        return "needs whole zero points"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    from quantkit.runtime.triton.fragments import by_tile, fragments, packed_zero

    zero = None if weight.zero_point is None else by_tile(packed_zero(weight.zero_point + 8))
    return Packed(
        fragments((weight.q + 8).to(torch.uint8), fine=False),
        by_tile(weight.scale.to(layer.dtype)),
        zero,
        weight.format.group_size or layer.shape[1],
        layer.shape[0],
    )


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.triton import matmul_4bit, matmul_4bit_few_rows

    x = x.contiguous()
    if x.shape[0] <= FEW_ROWS:
        return matmul_4bit_few_rows.few(
            x, packed.words, packed.scale, packed.zero, packed.rows,
            group=packed.group, floating=False,
        )  # fmt: skip
    return matmul_4bit.multiply(
        x, packed.words, packed.scale, packed.zero, packed.rows, bits=4, group=packed.group
    )
