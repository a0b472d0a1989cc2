"""Round-to-nearest quantizers of one block of weight rows, as pure functions.

Scales, zero points and codes are those of compressed-tensors (its min-max observer, then its
`quantize`) bit for bit: scale and quotient are rounded to the weight's own dtype, a zero scale
becomes the dtype's epsilon, NVFP4 scales are E4M3 under one float32 scale a tensor, and MX scales
are E8M0 (https://www.opencompute.org, OCP Microscaling Formats v1.0). Work is done in float32 on
blocks that fit the cache; the error is measured while the block is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch

from quantkit.checkpoint.schemes import NumberFormat

Clip = Literal["none", "mse"]

FP8_MAX = 448.0
FP4_MAX = 6.0
BLOCK_COLUMNS = 2048
_CLIP_FACTORS = (1.07, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)


class NonFiniteError(ValueError):
    """The block holds NaN or infinity."""


@dataclass(frozen=True)
class Rows:
    """A quantized block of rows.

    codes: [rows, in]; int8 for integers (centred on 0), float8_e4m3fn, or uint8 with one E2M1 code
        (0 … 15) an element.
    scale: on the format's grid, in the dtype that is stored: the weight's, float8_e4m3fn (NVFP4) or
        uint8 (MX exponents, biased by 127).
    zero_point: int8 on the same grid for asymmetric integers.
    noise, signal: sum of squared errors, and of squared weights; for FP8 with a scale a row or
        block over a quarter of the columns, which tells the ratio to 0.2 dB.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    noise: float
    signal: float

    def shaped(self, rows: int) -> Rows:
        """With codes, scales and zero points as matrices of `rows` rows (of blocks, for scales)."""
        tall = min(rows, self.scale.shape[0])
        point = self.zero_point
        return Rows(
            self.codes.view(rows, -1),
            self.scale.view(tall, -1),
            None if point is None else point.view(tall, -1),
            self.noise,
            self.signal,
        )


def quantize_rows(
    weight: torch.Tensor,
    number: NumberFormat,
    *,
    clip: Clip = "none",
    global_scale: torch.Tensor | None = None,
) -> Rows:
    """Quantize [rows, in] of a weight in bfloat16, float16 or float32.

    `rows` starts at a multiple of the format's block height. `global_scale` (NVFP4) is the float32
    scalar of `nvfp4_global_scale`. Raises NonFiniteError.
    """
    if number.granularity == "block":
        result = _in_columns(weight, number)
    else:
        rows, columns = weight.shape
        width = number.group_size if number.granularity == "group" else columns
        assert width
        cells = weight.view(rows, columns // width, width)
        result = _quantize_cells(cells, (-1,), number, clip, global_scale)
    return result.shaped(weight.shape[0])


def absolute_maximum(weight: torch.Tensor) -> float:
    """The largest magnitude. Raises NonFiniteError."""
    return float(_finite_amax(weight.view(1, -1), (-1,)))


def all_finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; true for what is not a 16- or 32-bit float."""
    if values.dtype not in _LAYOUT or not values.numel():
        return True
    return isfinite(float(_amax(values.reshape(1, -1), (-1,))))


def nvfp4_global_scale(amax: float, dtype: torch.dtype) -> torch.Tensor:
    """The float32 scale [1] that divides NVFP4's group scales, from a tensor's largest magnitude.

    It maps the largest group scale onto the E4M3 maximum; rounded to the weight's dtype first.
    """
    value = torch.tensor([amax], dtype=dtype).clamp(min=torch.finfo(dtype).tiny)
    return (FP8_MAX * FP4_MAX / value).nan_to_num(1.0, 1.0, 1.0).float()


def _in_columns(weight: torch.Tensor, number: NumberFormat) -> Rows:
    """Quantize square blocks, in stretches of columns that fit the cache; ragged edges are padded
    with zeros."""
    assert number.block
    high, wide = number.block
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    scales, noise, signal = [], 0.0, 0.0
    for at in range(0, columns, BLOCK_COLUMNS):
        part = weight[:, at : at + BLOCK_COLUMNS]
        width = part.shape[1]
        padding = (0, -width % wide, 0, -rows % high)
        padded = torch.nn.functional.pad(part, padding) if any(padding) else part.contiguous()
        cells = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
        result = _quantize_cells(cells, (-1, 1), number, "none", None)
        codes[:, at : at + width] = result.codes.view(padded.shape)[:rows, :width]
        scales.append(result.scale.view(cells.shape[0], cells.shape[2]))
        noise += result.noise
        signal += result.signal
    return Rows(codes, torch.cat(scales, 1), None, noise, signal)


def _quantize_cells(
    cells: torch.Tensor,
    dims: tuple[int, ...],
    number: NumberFormat,
    clip: Clip,
    global_scale: torch.Tensor | None,
) -> Rows:
    """Quantize with one scale for all elements along `dims`."""
    if number.is_int:
        return _integers(cells, dims, number, clip)
    largest = _finite_amax(cells, dims)
    four_bits = number.element == "fp4_e2m1"
    top = FP4_MAX if four_bits else FP8_MAX
    if number.scale == "e4m3":
        assert global_scale is not None
        stored = _e4m3_scale(largest / top, global_scale)
        scale = decode_e4m3(stored).mul_(E4M3_UNIT).div_(global_scale)
    elif number.scale == "e8m0":
        scale = _power_of_two(largest, 2 if four_bits else 8)
        stored = (127 + scale.float().log2()).to(torch.uint8)
    else:
        stored = scale = _nonzero(largest / top)
    scaled = cells / scale
    if four_bits:
        codes, rounded = _round_e2m1(scaled.float().clamp_(-top, top))
        return Rows(codes, stored, None, *_measure(cells, rounded, scale))
    if float(scale.min()) < torch.finfo(cells.dtype).tiny or number.scale == "e8m0":
        scaled.clamp_(-top, top)  # elsewhere no quotient rounds to more than the maximum
    codes = scaled.to(torch.float8_e4m3fn)
    del scaled
    seen = cells.shape[-1] // (4 if number.scale == "float" else 1)
    rounded = decode_e4m3(codes[..., :seen])
    return Rows(codes, stored, None, *_measure(cells[..., :seen], rounded, scale, E4M3_UNIT))


def _integers(cells: torch.Tensor, dims: tuple[int, ...], number: NumberFormat, clip: Clip) -> Rows:
    grid = (_symmetric_grid if number.symmetric else _asymmetric_grid)(cells, dims, number.bits)
    scale, zero = grid(1.0)
    if clip == "mse":
        scale, zero = _least_noise(cells, dims, number.bits, grid)
    levels = _levels(cells, scale, zero, number.bits)
    codes = levels.to(torch.int8)
    rounded = levels if zero is None else levels.sub_(zero)
    point = None if zero is None else zero.to(torch.int8)
    return Rows(codes, scale, point, *_measure(cells, rounded, scale))


Grid = Callable[[float], tuple[torch.Tensor, torch.Tensor | None]]
"""Clipping factor (1: none) → scales and zero points, both in the weight's dtype."""


def _symmetric_grid(cells: torch.Tensor, dims: tuple[int, ...], bits: int) -> Grid:
    largest, half = _finite_amax(cells, dims), (2.0**bits - 1) / 2

    def grid(factor: float) -> tuple[torch.Tensor, None]:
        return _nonzero(largest * factor / half), None

    return grid


def _asymmetric_grid(cells: torch.Tensor, dims: tuple[int, ...], bits: int) -> Grid:
    _finite_amax(cells, dims)
    lowest = cells.amin(dims, keepdim=True).clamp_(max=0)
    highest = cells.amax(dims, keepdim=True).clamp_(min=0)
    least, most = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1

    def grid(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = lowest * factor, highest * factor
        scale = (high - low) / (2.0**bits - 1)
        zero = (least - low / scale).nan_to_num_(0.0).clamp_(least, most).round_()
        return _nonzero(scale), zero

    return grid


def _least_noise(
    cells: torch.Tensor, dims: tuple[int, ...], bits: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The grid of each cell with the least squared error, over the clipping factors."""
    values = cells.float()
    least = torch.full((), torch.inf, device=values.device)
    scale, zero = grid(1.0)
    for factor in _CLIP_FACTORS:
        new_scale, new_zero = grid(factor)
        levels = _levels(cells, new_scale, new_zero, bits)
        rounded = levels if new_zero is None else levels.sub_(new_zero)
        noise = rounded.mul_(new_scale).sub_(values).square_().sum(dims, keepdim=True)
        better = noise < least
        least = torch.where(better, noise, least)
        scale = torch.where(better, new_scale, scale)
        if zero is not None and new_zero is not None:
            zero = torch.where(better, new_zero, zero)
    return scale, zero


def _levels(
    cells: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Codes as float32; the quotient is rounded to the weight's dtype, and so is its sum."""
    scaled = cells / scale
    if zero is not None:
        scaled += zero
    return scaled.float().clamp_(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1).round_()


def _e4m3_scale(local: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    scale = (global_scale * local).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    bits = scale.view(torch.uint8)
    return torch.where(bits == 0, _E4M3_EIGHTH, bits).view(torch.float8_e4m3fn)


_E4M3_EIGHTH = 0x20
"""0.125: what a zero scale becomes."""


def _power_of_two(largest: torch.Tensor, offset: int) -> torch.Tensor:
    """The MX scale in the weight's dtype: the power of two at or under `largest`, rounded up from
    a mantissa of 1.75, divided by 2**offset."""
    mantissa, bias, view = _LAYOUT[largest.dtype]
    exponent = (largest.view(view).to(torch.int32) + (1 << (mantissa - 2))) >> mantissa
    biased = torch.where(exponent == 0, 0, exponent - bias + 127 - offset).clamp_(0, 255)
    bits = torch.where(biased == 0, 1 << 22, biased << 23)
    scale = bits.to(torch.int32).view(torch.float32).to(largest.dtype)
    return torch.where(scale == 0, 1.0, scale)


_LAYOUT: dict[torch.dtype, tuple[int, int, torch.dtype]] = {
    torch.bfloat16: (7, 127, torch.int16),
    torch.float16: (10, 15, torch.int16),
    torch.float32: (23, 127, torch.int32),
}
"""Dtype → bits of mantissa, exponent bias, integer of the same width."""


_EXPONENT, _ONE = 0x7F800000, 0x3F800000
_THREE_HALVES_OF_2_22 = 0x0B400000
"""Added to the bits of a power of two p in float32: 1.5 × 2**22 × p, whose last place is p / 2."""


def _round_e2m1(scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values of the nearest E2M1 number, ties to even, of float32 in [-6, 6].

    The step is p / 2 for the power of two p at or under the magnitude, and at least 1/2: a number
    with that last place, added and taken away, rounds to it.
    """
    bits = scaled.add_(0.0).view(torch.int32)
    anchor = bits.bitwise_and(_EXPONENT).clamp_(min=_ONE).add_(_THREE_HALVES_OF_2_22)
    negative = bits.bitwise_right_shift(28).to(torch.int8).bitwise_and_(8)
    rounded = scaled.add(anchor.view(torch.float32)).sub_(anchor.view(torch.float32))
    halves = (rounded * 2).to(torch.int8).abs_()
    codes = halves.clamp(max=4).add_(negative).sub_(4)
    codes.add_(halves.clamp(4, 8).bitwise_right_shift_(1))
    codes.add_(halves.clamp_(8, 12).bitwise_right_shift_(2))
    return codes.view(torch.uint8), rounded


E4M3_UNIT = 2.0**8


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn without NaN → float32 in units of E4M3_UNIT: the bits, moved into a float16
    whose exponent has another bias (torch's own cast is 10 × slower)."""
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).float()


def _amax(cells: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The largest magnitude along `dims` (kept), NaN or infinity where there is one."""
    if cells.dtype == torch.float32:
        return cells.abs().amax(dims, keepdim=True)
    size = cells.view(torch.int16).bitwise_and(0x7FFF)
    for dim in dims:
        size = size.amax(dim, keepdim=True)
    return size.view(cells.dtype)


def _finite_amax(cells: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """As `_amax`. Raises NonFiniteError."""
    largest = _amax(cells, dims)
    if not isfinite(float(largest.max())):
        raise NonFiniteError
    return largest


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _measure(
    cells: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor, unit: float = 1.0
) -> tuple[float, float]:
    """Sum of squared errors of `rounded` × `scale` × `unit`, and of squared weights; `rounded` is
    overwritten."""
    values = cells.float()
    torch.addcmul(values, rounded, scale.float() * unit, value=-1, out=rounded)
    error, flat = rounded.reshape(-1), values.reshape(-1)
    return float(torch.dot(error, error)), float(torch.dot(flat, flat))
