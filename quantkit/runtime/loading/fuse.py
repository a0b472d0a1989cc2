"""Fused groups (q/k/v, gate/up) as engines serve them: one weight, one scale where it is a scalar.

Engines merge such siblings into one layer. Per-tensor FP8 weights of unequal scales are then
requantized to the largest (vLLM `w8a8_utils.requantize_with_max_scale`), and static input scales
become the largest one, with zero points that of the union of their ranges (vLLM's
`process_weights_after_loading` of int8 linear layers); a model measured with the scales of the file
is not the one that is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from quantkit.checkpoint.schemes import Scheme
from quantkit.errors import InputError
from quantkit.formats.base import QuantWeight

Fuse = Literal["engine", "none"]

_FP8_MAX = 448.0
_INT8 = torch.iinfo(torch.int8)


def harmonize(
    names: Sequence[str], weights: Sequence[QuantWeight], scheme: Scheme
) -> list[QuantWeight]:
    """The members of a fused group with the scales that an engine gives them.

    Raises InputError for FP4 members of unequal global scales: engines use one, and are wrong.
    """
    result = list(weights)
    if scheme.weight.element == "fp8_e4m3" and scheme.weight.granularity == "tensor":
        largest = torch.stack([weight.scale.reshape(()) for weight in result]).max()
        if any(bool(weight.scale != largest) for weight in result):
            result = [requantize(weight, largest) for weight in result]
    _check_global_scales(names, result, scheme)
    return _with_one_input_scale(result)


def requantize(weight: QuantWeight, scale: torch.Tensor) -> QuantWeight:
    """A per-tensor FP8 weight on another scale, with the roundings of the engines.

    The codes are dequantized in float16, scale included, and divided by the new one in float32.
    """
    half = weight.q.to(torch.float16) * weight.scale.reshape(()).to(torch.float16)
    scaled = half.float() * (1.0 / scale)
    codes = scaled.clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return replace(weight, q=codes, scale=scale.reshape(1, 1).clone())


def join(weights: Sequence[QuantWeight]) -> QuantWeight | None:
    """Members of one input stacked along the output, or None where they cannot be.

    Unequal scales of tensors become one scale a channel, which changes no value.
    """
    first = weights[0]
    alike = all(
        weight.format == first.format
        and weight.q.dtype == first.q.dtype
        and _equal(weight.global_scale, first.global_scale)
        and _equal(weight.g_idx, first.g_idx)
        and _equal(weight.input_scale, first.input_scale)
        and _equal(weight.input_zero_point, first.input_zero_point)
        and _equal(weight.input_multiplier, first.input_multiplier)
        and (weight.zero_point is None) == (first.zero_point is None)
        for weight in weights
    )
    if not alike:
        return None
    number, scales = first.format, [weight.scale for weight in weights]
    zeros = [weight.zero_point for weight in weights]
    if number.granularity == "block":
        assert number.block
        if any(weight.q.shape[0] % number.block[0] for weight in weights[:-1]):
            return None
    if number.granularity == "tensor":
        if all(torch.equal(scale, scales[0]) for scale in scales) and zeros[0] is None:
            scales = scales[:1]
        else:
            number = replace(number, granularity="channel")
            scales = [w.scale.expand(w.q.shape[0], 1) for w in weights]
            zeros = [None if z is None else z.expand(w.q.shape[0], 1)
                     for w, z in zip(weights, zeros, strict=True)]  # fmt: skip
    return replace(
        first,
        format=number,
        q=torch.cat([weight.q for weight in weights]),
        scale=torch.cat(scales),
        zero_point=_cat(zeros),
        bias=_cat([_bias(w) for w in weights])
        if any(w.bias is not None for w in weights)
        else None,
    )


def _cat(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _bias(weight: QuantWeight) -> torch.Tensor:
    return weight.scale.new_zeros(weight.q.shape[0]) if weight.bias is None else weight.bias


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.flatten(), other.flatten())


def _with_one_input_scale(weights: list[QuantWeight]) -> list[QuantWeight]:
    scales = [w.input_scale.reshape(()) for w in weights if w.input_scale is not None]
    if len(scales) < len(weights):
        return weights
    if any(weight.input_zero_point is not None for weight in weights):
        return _with_one_input_range(weights)
    largest = torch.stack(scales).max()
    return [replace(weight, input_scale=largest) for weight in weights]


def _with_one_input_range(weights: list[QuantWeight]) -> list[QuantWeight]:
    """Asymmetric static INT8 inputs on the scale and zero point that hold all of their ranges."""
    pairs = [(_scalar(weight.input_scale), _scalar(weight.input_zero_point)) for weight in weights]
    if len(set(pairs)) == 1:
        return weights
    low = min(scale * (_INT8.min - zero) for scale, zero in pairs)
    high = max(scale * (_INT8.max - zero) for scale, zero in pairs)
    scale = (high - low) / (_INT8.max - _INT8.min)
    zero = int(_INT8.min - low / scale)  # towards 0, as vLLM casts it
    like = weights[0].input_scale
    assert like is not None
    return [
        replace(
            weight,
            input_scale=like.new_tensor(scale),
            input_zero_point=like.new_tensor(float(zero)),
        )
        for weight in weights
    ]


def _scalar(tensor: torch.Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.reshape(()))


def _check_global_scales(
    names: Sequence[str], weights: Sequence[QuantWeight], scheme: Scheme
) -> None:
    if scheme.weight.scale != "e4m3":
        return
    two_level_input = scheme.input is not None and scheme.input.scale == "e4m3"
    for what, values in (
        ("weight", [w.global_scale for w in weights]),
        ("input", [w.input_scale for w in weights] if two_level_input else []),
    ):
        numbers = [float(value) for value in values if value is not None]
        if len(set(numbers)) > 1:
            parent = names[0].rpartition(".")[0]
            listed = ", ".join(
                f"{name.rpartition('.')[2]} {number:.6g}"
                for name, number in zip(names, numbers, strict=True)
            )
            raise InputError(
                f"{parent}: the {what} global scales differ ({listed}); engines use one of them "
                "for the merged layer.",
                hint="quantize again with one global scale a fused group, or load with fuse=none",
                code="runtime.global_scales_differ",
            )
