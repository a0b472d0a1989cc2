"""INT4 weights with 16-bit activations on a CPU: torch's packed product for few rows.

`_weight_int4pack_mm_for_cpu` decodes as it multiplies, once for every row of the input: the best
there is for one, slower than expanding the weight from some dozens on. Layout of its weight
(ATen `native/cpu/int4mm_kernel.cpp`): blocks of rows, of which the first half is in low nibbles
and the second in high ones, [out / block, in, block / 2]; the block depends on the CPU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from quantkit.backends.process.float32_products import slow_bfloat16
from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription

NAME = "int4_cpu"
FEW_ROWS = 48
"""Inputs of up to so many rows take the packed product."""

_GROUPS = (256, 128, 64, 32)
_BLOCKS = (64, 32)
_ALIGNMENT = 64
_PACKED_ROWS = 512
_EXPANDED_COLUMNS = 1024


class Packed(NamedTuple):
    """`weight` as torch packs it, rows padded to 64; `scale_zero` [in / group, padded out, 2]."""

    weight: torch.Tensor
    scale_zero: torch.Tensor
    group: int
    shape: tuple[int, int]


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    if device.type != "cpu":
        return "runs on a CPU"
    return None if _block() else "this torch packs int4 weights in an order that is not known here"


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight = layer.scheme.weight
    if weight.element != "int4" or layer.scheme.input is not None:
        return "computes INT4 weights with 16-bit activations"
    if layer.dtype != torch.bfloat16:
        return f"computes in bfloat16, not {str(layer.dtype).removeprefix('torch.')}"
    if _group(weight.group_size, layer.shape[1]) is None:
        size = weight.group_size or layer.shape[1]
        return f"needs groups of a multiple of 32 columns that divide the input, not {size}"
    return None


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    rows, columns = weight.q.shape
    group = _group(weight.format.group_size, columns)
    assert group
    padding = -rows % _ALIGNMENT
    packed = torch.empty(rows + padding, columns // 2, dtype=torch.uint8)
    for start in range(0, rows, _PACKED_ROWS):
        codes = (weight.q[start : start + _PACKED_ROWS] + 8).view(torch.uint8)
        part = _encode(torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % _ALIGNMENT)))
        packed[start : start + part.shape[0]] = part
    scale = _on_groups(weight.scale, columns // group)
    zero = torch.zeros_like(scale)
    if weight.zero_point is not None:
        zero = -_on_groups(weight.zero_point, columns // group) * scale
    pair = torch.stack((scale, zero), -1).transpose(0, 1)
    pair = torch.nn.functional.pad(pair, (0, 0, 0, padding))
    return Packed(packed, pair.to(layer.dtype).contiguous(), group, (rows, columns))


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    if x.shape[0] > FEW_ROWS:
        return _expanded(x, packed)
    result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), packed.weight, packed.group, packed.scale_zero
    )
    return result[:, : packed.shape[0]].contiguous()


def _expanded(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """The product with the weight decoded, some columns of the output at a time."""
    rows = packed.shape[0]
    result = x.new_empty(x.shape[0], packed.scale_zero.shape[1])
    wide = x.float() if slow_bfloat16() else x
    scale, zero = (grid.to(wide.dtype).contiguous() for grid in packed.scale_zero.unbind(-1))
    zero.addcmul_(scale, scale.new_full((), -8.0))
    for start in range(0, result.shape[1], _EXPANDED_COLUMNS):
        part = slice(start, min(start + _EXPANDED_COLUMNS, result.shape[1]))
        weight = _decode(packed.weight[part], _block(), wide.dtype)
        cells = weight.view(-1, packed.group, weight.shape[1])
        torch.addcmul(zero[:, None, part], cells, scale[:, None, part], out=cells)
        if wide is x:
            torch.mm(x, weight, out=result[:, part])
        else:
            result[:, part] = wide @ weight
    return result[:, :rows].contiguous()


def _encode(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [out, in] of whole blocks as torch packs them, [out, in / 2].

    `_convert_weight_to_int4pack_for_cpu` wants int32 codes and takes 18 times as long.
    """
    block, columns = _block(), codes.shape[1]
    low, high = codes.view(-1, 2, block // 2, columns).unbind(1)
    pairs = high.bitwise_left_shift(4).bitwise_or_(low)
    return pairs.transpose(1, 2).reshape(codes.shape[0], columns // 2)


def _decode(packed: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of torch's packed codes [out, in / 2], a multiple of the block → codes [in, out]."""
    pairs = packed.reshape(packed.shape[0] // block, -1, block // 2).transpose(0, 1)
    codes = torch.empty(pairs.shape[0], pairs.shape[1], 2, block // 2, dtype=dtype)
    codes[:, :, 0] = pairs & 15
    codes[:, :, 1] = pairs >> 4
    return codes.flatten(1)


@cache
def _block() -> int:
    """How many rows torch packs together on this CPU; 0 when its order is none of those known."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (_ALIGNMENT, 32), generator=generator, dtype=torch.int32)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, AttributeError):
        return 0
    fits = (b for b in _BLOCKS if torch.equal(_decode(packed, b, codes.dtype), codes.T))
    return next(fits, 0)


def _group(size: int | None, columns: int) -> int | None:
    """The widest group that torch takes and that divides the weight's own (None: a channel)."""
    if columns % (size or columns):
        return None
    return next((g for g in _GROUPS if (size or columns) % g == 0), None)


def _on_groups(grid: torch.Tensor, groups: int) -> torch.Tensor:
    """A grid [out, n] repeated to [out, groups]."""
    return grid.repeat_interleave(groups // grid.shape[1], dim=1)
