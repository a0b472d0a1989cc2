"""8-bit weights (INT8, FP8, MXFP8) with 16-bit activations on a GPU in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import no_gpu, no_triton, not_bfloat16

NAME = "weight8_triton"
FEW_ROWS = 4
_CHUNK = 16


class Packed(NamedTuple):
    """`weight` int8 or FP8 [out, in]; `scale` float32 [out], or with `group` a grid
    [out / height, in / group] that `zero` shares."""

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: int
    height: int


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device, (8, 9)) or no_triton()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, columns = layer.scheme.weight, layer.shape[1]
    if weight.element not in ("int8", "fp8_e4m3") or layer.scheme.input is not None:
        return "computes 8-bit weights with 16-bit activations"
    if columns % _CHUNK:
        return f"needs a multiple of 16 inputs, not {columns}"
    size = weight.block[1] if weight.block else weight.group_size or columns
    if size % _CHUNK:
        return f"needs groups of a multiple of 16 inputs, not {size}"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    number = weight.format
    grid = number.granularity in ("group", "block")
    scale = weight.scale.float().contiguous()
    if number.granularity == "tensor":
        scale = scale.expand(layer.shape[0], 1).contiguous()
    zero = None if weight.zero_point is None else weight.zero_point.float().contiguous()
    if not grid and zero is None:
        return Packed(weight.q.contiguous(), scale.reshape(-1), None, 0, 1)
    size = number.block[1] if number.block else number.group_size or layer.shape[1]
    height = number.block[0] if number.block else 1
    return Packed(weight.q.contiguous(), scale, zero, size, height)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.triton import matmul_4bit, matvec_8bit

    x = x.contiguous()
    if x.shape[0] <= FEW_ROWS:
        return matvec_8bit.eight_bits(
            x, None, packed.weight, packed.scale, packed.zero,
            dtype=x.dtype, group=packed.group, height=packed.height,
        )  # fmt: skip
    return matmul_4bit.multiply(
        x, packed.weight, packed.scale, packed.zero, packed.weight.shape[0],
        bits=8, group=packed.group, height=packed.height,
    )  # fmt: skip
