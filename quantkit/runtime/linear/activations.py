"""Activations quantized as a scheme says: static or dynamic, a tensor, token or group a scale.

The rules are those of the engines: FP8 and INT8 divide by the scale and round to nearest even;
NVFP4 stores E4M3 group scales under one float32 scale a tensor; MX formats take powers of two
(MXFP4 by vLLM's "even" rule, `mxfp4_utils`; MXFP8 rounds up, as FlashInfer's quantizer does).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.checkpoint.schemes import NumberFormat

FP8_MAX = 448.0
FP4_MAX = 6.0
_FP8_LEAST_SCALE = 1.0 / (FP8_MAX * 512)


class Codes(NamedTuple):
    """`values` [m, in]: int8 or float8_e4m3fn; `scale` float32: scalar, [m, 1] or [m, groups]."""

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None


def quantize_codes(
    x: torch.Tensor,
    number: NumberFormat,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None = None,
) -> Codes:
    """8-bit codes of x [m, in], and their scales; `scale` is the static one (None: dynamic).

    INT4 codes come in int8. Zero rows get the least scale of their format.
    """
    top = FP8_MAX if number.element == "fp8_e4m3" else 2.0 ** (number.bits - 1) - 1
    if scale is not None:
        scale = scale.reshape(())
        return Codes(_codes(x, scale, top, zero_point), scale, zero_point)
    if number.granularity == "group":
        assert number.group_size
        cells = _cells(x, number.group_size)
        scale = _dynamic_scale(cells, top)
        return Codes(_codes(cells, scale, top).flatten(1)[:, : x.shape[1]], scale.squeeze(-1))
    scale = _dynamic_scale(x, top)
    if number.granularity == "tensor":
        scale = scale.amax()
    return Codes(_codes(x, scale, top), scale)


def _codes(
    x: torch.Tensor, scale: torch.Tensor, top: float, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """x × (1 / scale) rounded to int8, or to FP8 where that is the element's largest number."""
    scaled = x.float() * (1.0 / scale)
    if top == FP8_MAX:
        return scaled.clamp_(-top, top).to(torch.float8_e4m3fn)
    scaled.round_()
    if zero_point is not None:
        scaled += zero_point.reshape(())
    return scaled.clamp_(-top - 1, top).to(torch.int8)


def _dynamic_scale(values: torch.Tensor, top: float) -> torch.Tensor:
    """float32 scale of each row (last dimension, kept) that takes its largest magnitude to top."""
    least = _FP8_LEAST_SCALE if top == FP8_MAX else torch.finfo(torch.float32).eps
    return (largest_magnitude(values) / top).clamp_(min=least)


def largest_magnitude(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude along the last dimension (kept), float32.

    Magnitudes of bfloat16 are ordered as their bits are, which a CPU compares several times faster.
    """
    if values.dtype != torch.bfloat16:
        return values.abs().amax(-1, keepdim=True).float()
    bits = values.view(torch.int16).bitwise_and(0x7FFF).amax(-1, keepdim=True)
    return bits.view(torch.bfloat16).float()


def round_groups(
    x: torch.Tensor, number: NumberFormat, global_scale: torch.Tensor | None
) -> torch.Tensor:
    """x [m, in] rounded to an FP4 or MX format, group scales applied, in the dtype of x.

    NVFP4's `global_scale` is *not* applied: what is left is a product of an E2M1 and an E4M3
    number, exact in bfloat16. MX results are exact in bfloat16 too.
    """
    assert number.group_size
    cells = _cells(x, number.group_size)
    largest = cells.abs().amax(-1, keepdim=True)
    top = FP4_MAX if number.element == "fp4_e2m1" else FP8_MAX
    if number.scale == "e4m3":
        if global_scale is not None:
            cells = cells / global_scale
            largest = largest / global_scale
        stored = (largest / top).clamp_(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        scale = stored
        divisor = torch.where(stored == 0, torch.inf, stored)
    else:
        exponent = _exponent(largest, number)
        scale = divisor = torch.exp2(exponent)
    scaled = (cells / divisor).clamp_(-top, top)
    rounded = round_e2m1(scaled) if top == FP4_MAX else scaled.to(torch.float8_e4m3fn).float()
    return (rounded * scale).flatten(1)[:, : x.shape[1]].to(x.dtype)


def global_scale(x: torch.Tensor) -> torch.Tensor:
    """NVFP4's global scale of x, float32 scalar: what takes its largest magnitude to the top."""
    return (x.abs().amax().float() / (FP4_MAX * FP8_MAX)).clamp_(
        min=torch.finfo(torch.float32).tiny
    )


def round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """float32 in [-6, 6] → the nearest E2M1 number, ties to the even code.

    The step is 0.5 up to 2, 1 up to 4 and 2 above: half the power of two under the value.
    """
    _, exponent = torch.frexp(values)
    step = torch.exp2((exponent - 2).clamp_(min=-1).float())
    return (values / step).round_().mul_(step)


def _exponent(largest: torch.Tensor, number: NumberFormat) -> torch.Tensor:
    """The MX exponent of each group, from its largest magnitude.

    MXFP4: the power of two at or under it (over it from a mantissa of 1.75 on), less that of 4.
    """
    if number.element == "fp4_e2m1":
        mantissa, exponent = torch.frexp(largest)
        raw = exponent.float() + (mantissa >= 0.875).float() - 3
    else:
        mantissa, exponent = torch.frexp(largest / FP8_MAX)
        raw = exponent.float() - (mantissa == 0.5).float()
    return raw.clamp_(-127, 127)


def _cells(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [m, in] → float32 [m, groups, size], the last group padded with zeros."""
    short = -x.shape[1] % size
    padded = torch.nn.functional.pad(x, (0, short)) if short else x
    return padded.float().view(x.shape[0], -1, size)
