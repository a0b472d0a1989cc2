"""A linear layer as the kernels see it: its scheme and shape before the weight, and the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantkit.checkpoint.schemes import Scheme
from quantkit.errors import InputError
from quantkit.formats.base import QuantWeight


@dataclass(frozen=True)
class LayerDescription:
    """What a kernel must compute: y[m, out] = quantize(x[m, in]) @ W.T, both in `dtype`.

    `shape` is [out, in]. `has_zero_point` says that integer codes are not centred on zero, and
    `whole_zero_points` that what they are relative to is one of them; `negative_scales` that some
    FP4 group has one.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    has_zero_point: bool = False
    whole_zero_points: bool = True
    negative_scales: bool = False

    @property
    def quantizes_input(self) -> bool:
        return self.scheme.input is not None


def describe(
    name: str, scheme: Scheme, weight: QuantWeight, dtype: torch.dtype
) -> LayerDescription:
    """The layer that a weight (as `centred` leaves it) makes under `scheme`."""
    rows, columns = weight.q.shape
    own = Scheme(scheme.name, weight.format, scheme.input)
    zero = weight.zero_point
    whole = zero is None or bool((zero == zero.round()).all())
    four = weight.format.element == "fp4_e2m1"
    negative = four and bool((weight.scale.float() < 0).any())
    return LayerDescription(name, own, (rows, columns), dtype, zero is not None, whole, negative)


def centred(weight: QuantWeight) -> QuantWeight:
    """Integer codes as int8; a zero point that all groups share is folded into them.

    Layouts that store unsigned codes (uint8) have zero points around 2^(bits - 1), and symmetric
    weights a constant one there. A zero point that differs between groups, or that takes a code
    out of the range of its bits (kernels pack codes of 4 bits and fewer), is left.
    """
    if not weight.format.is_int:
        return weight
    q, zero = weight.q, weight.zero_point
    half = 1 << (weight.format.bits - 1)
    if q.dtype == torch.uint8:
        q = (q ^ 128).view(torch.int8) if half == 128 else q.view(torch.int8) - half
        zero = (0.0 if zero is None else zero) - torch.full_like(weight.scale, half)
    q = q.to(torch.int8)
    if zero is None:
        return replace(weight, q=q)
    first = float(zero.flatten()[0])
    low, high = (int(value) for value in torch.aminmax(q))
    fits = first == int(first) and low - first >= -half and high - first < half
    if not fits or not bool((zero == first).all()):
        return replace(weight, q=q, zero_point=zero)
    return replace(weight, q=q - int(first), zero_point=None)


def contiguous_groups(name: str, weight: QuantWeight) -> tuple[QuantWeight, torch.Tensor | None]:
    """Act-order undone: columns sorted by group, and the order that the input must be taken in.

    The order is None where groups are contiguous already. Raises InputError for a `g_idx` whose
    groups do not all have the group size, which no kernel could address.
    """
    if weight.g_idx is None:
        return weight, None
    size = weight.format.group_size or weight.q.shape[1]
    groups = weight.g_idx.long()
    order = torch.argsort(groups, stable=True)
    columns = torch.arange(order.numel(), device=order.device)
    if not torch.equal(groups[order], columns // size):
        raise InputError(
            f"g_idx of {name} does not give {size} columns to each group.",
            hint="quantize the model again: its act-order table is damaged",
            code="runtime.group_index",
        )
    if torch.equal(order, columns):
        return replace(weight, g_idx=None), None
    return replace(weight, q=weight.q[:, order].contiguous(), g_idx=None), order


def rows_of(weight: QuantWeight, rows: slice) -> QuantWeight:
    """The weight of some output rows; a slice of blocks starts at a multiple of their height."""

    def grid(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None or values.shape[0] == 1:
            return values
        if weight.format.granularity != "block":
            return values[rows]
        assert weight.format.block
        height = weight.format.block[0]
        assert rows.start % height == 0
        return values[rows.start // height : -(-rows.stop // height)]

    scale = grid(weight.scale)
    assert scale is not None
    return replace(
        weight,
        q=weight.q[rows],
        scale=scale,
        zero_point=grid(weight.zero_point),
        bias=None if weight.bias is None else weight.bias[rows],
    )
