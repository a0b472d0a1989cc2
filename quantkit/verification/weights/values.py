"""The values of one quantized layer: all finite and in range, and no scale wrongly zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantkit.formats.base import LayerSpec, QuantWeight, TensorSpec
from quantkit.formats.dequantize import dequantize, effective_scale
from quantkit.verification.findings import Finding, error

if TYPE_CHECKING:
    import torch

SMALLEST_NORMAL = 2.0**-126
"""Smaller float32 values count as zero: kernels flush them."""

_AGAIN = "quantize the layer again; a step before the export lost its scale"
_POSITIVE = {
    "input_scale", "input_global_scale", "input_global_scale_inverse", "cast_scale",
}  # fmt: skip


def check_tensors(
    module: str, tensors: Mapping[str, torch.Tensor], roles: Mapping[str, TensorSpec]
) -> list[Finding]:
    """Findings on the stored tensors themselves, each by the rule of its role."""
    findings: list[Finding] = []
    for suffix, tensor in tensors.items():
        if suffix in roles and roles[suffix].role != "bias":
            findings += _check_tensor(f"{module}.{suffix}", tensor, roles[suffix].role)
    return findings


def check_weight(
    module: str, weight: QuantWeight, spec: LayerSpec, source: torch.Tensor | None
) -> list[Finding]:
    """Findings on the layer as a whole: effective scales, zero points, groups of columns.

    A zero scale is an error only where the weights that it scales are not all zero: those of
    `source` [out, in], or without one the codes.
    """
    return [
        *_check_scales(module, weight, source),
        *_check_zero_points(module, weight, spec),
        *_check_groups(module, weight, spec),
    ]


def _check_tensor(name: str, tensor: torch.Tensor, role: str) -> Iterator[Finding]:
    import torch

    if role == "scale_e8m0":
        bad = int((tensor.view(torch.uint8) == 255).sum())
        if bad:
            yield error(
                "scale.nonfinite", f"{name} holds {bad} NaN exponents (code 255)", _AGAIN, name
            )
        return
    if tensor.dtype is torch.float8_e4m3fn:
        bad = int(((tensor.view(torch.uint8) & 0x7F) == 0x7F).sum())
    elif tensor.is_floating_point():
        bad = int((~torch.isfinite(tensor.float())).sum())
    else:
        return
    if bad:
        code = "codes.nonfinite" if role == "weight" else "scale.nonfinite"
        yield error(code, f"{name} holds {bad} NaN or infinite values", _AGAIN, name)
    elif role in _POSITIVE and bool((tensor.float() <= 0).any()):
        yield error(
            "input_scale.not_positive",
            f"{name} is {float(tensor.float().min()):g}; a static activation scale is positive",
            "calibrate again: the layer saw no activations",
            name,
        )
    elif role == "input_multiplier" and bool((tensor.float() == 0).any()):
        count = int((tensor.float() == 0).sum())
        yield error("scale.zero", f"{name} erases {count} input channels", _AGAIN, name)


def _check_scales(
    module: str, weight: QuantWeight, source: torch.Tensor | None
) -> Iterator[Finding]:
    import torch

    scale = effective_scale(weight)
    if not bool(torch.isfinite(scale).all()):
        yield error(
            "scale.nonfinite",
            f"{module} has {int((~torch.isfinite(scale)).sum())} effective scales (scale × global) "
            "that are NaN or infinite",
            _AGAIN,
            module,
        )
        return
    if not weight.format.is_int and (least := _least_scale(weight)) < 0:
        yield error(
            "scale.negative",
            f"{module} has negative scales (the least is {least:g}); those of floating-point "
            "formats are positive, and kernels take them to be",
            _AGAIN,
            module,
        )
        return
    dead = scale.abs() < SMALLEST_NORMAL
    if not bool(dead.any()):
        return
    content = source if source is not None else _codes(weight)
    erased = (_spread(weight, dead.float()) != 0) & (content.abs() >= SMALLEST_NORMAL)
    if bool(erased.any()):
        row = int(erased.any(1).nonzero()[0])
        of = "the source's weights" if source is not None else "its codes"
        yield error(
            "scale.zero",
            f"{module} has {int(dead.sum())} zero or underflowed effective scales where {of} are "
            f"not zero ({int(erased.sum())} weights erased, the first in row {row})",
            _AGAIN,
            module,
        )


def _least_scale(weight: QuantWeight) -> float:
    """The least of the scales and the global scale."""
    least = float(weight.scale.min())
    return least if weight.global_scale is None else min(least, float(weight.global_scale.min()))


def _codes(weight: QuantWeight) -> torch.Tensor:
    """Decoded codes minus zero points, float32 [out, in]."""
    import torch

    ones = torch.ones_like(weight.scale)
    return dequantize(replace(weight, scale=ones, global_scale=None, input_multiplier=None))


def _spread(weight: QuantWeight, grid: torch.Tensor) -> torch.Tensor:
    """A grid like the scale's spread over the weights it belongs to, float32 [out, in]."""
    import torch

    plain = replace(weight.format, element="int8")
    ones = torch.ones(weight.q.shape, dtype=torch.int8)
    return dequantize(QuantWeight(plain, ones, grid, g_idx=weight.g_idx))


def _check_zero_points(module: str, weight: QuantWeight, spec: LayerSpec) -> Iterator[Finding]:
    zero = weight.zero_point
    if zero is None:
        return
    bits = spec.scheme.weight.bits
    low, high = float(zero.min()), float(zero.max())
    if not (-(2 ** (bits - 1)) <= low and high <= 2**bits):
        yield error(
            "zero_point.out_of_range",
            f"{module} has zero points from {low:g} to {high:g}; {bits}-bit codes reach "
            f"from {-(2 ** (bits - 1))} to {2**bits}",
            _AGAIN,
            module,
        )


def _check_groups(module: str, weight: QuantWeight, spec: LayerSpec) -> Iterator[Finding]:
    if weight.g_idx is None:
        return
    groups, size = weight.scale.shape[1], spec.scheme.weight.group_size or 0
    low, high = int(weight.g_idx.min()), int(weight.g_idx.max())
    if low < 0 or high >= groups:
        yield error(
            "g_idx.out_of_range",
            f"{module}.g_idx runs from {low} to {high}; there are {groups} groups",
            _AGAIN,
            module,
        )
        return
    counts = weight.g_idx.long().bincount(minlength=groups)
    if size and int(counts.max()) > size:
        yield error(
            "g_idx.uneven",
            f"{module}.g_idx puts {int(counts.max())} columns into one group of {size}",
            _AGAIN,
            module,
        )
