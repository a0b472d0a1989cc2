"""Random weights of every scheme, and the scheme's own arithmetic in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit.checkpoint.schemes import SCHEMES, NumberFormat, Scheme
from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import (
    LayerDescription,
    centred,
    describe,
)

CPU = torch.device("cpu")
ROWS = (1, 3, 300)
"""One row, few, and more than one block of every kernel."""

INT8_ASYMMETRIC = replace(SCHEMES["w8a16"].weight, symmetric=False)
W4A16 = SCHEMES["w4a16"]
FP8_BLOCK_64 = SCHEMES["fp8_block_weight_only"].with_weight(block=(64, 64))
SHAPES: dict[str, tuple[Scheme, tuple[int, int]]] = {
    "fp8": (SCHEMES["fp8"], (77, 99)),
    "fp8_dynamic": (SCHEMES["fp8_dynamic"], (33, 51)),
    "fp8_block": (SCHEMES["fp8_block"], (200, 300)),
    "fp8_block_weight_only": (FP8_BLOCK_64, (97, 70)),
    "w8a8": (SCHEMES["w8a8"], (93, 75)),
    "w8a8_dynamic": (SCHEMES["w8a8_dynamic"], (1, 35)),
    "w8a8_one_scale": (replace(SCHEMES["w8a8"], weight=NumberFormat("int8", "tensor")), (65, 30)),
    "w8a8_dynamic_tensor": (
        replace(SCHEMES["w8a8"], input=NumberFormat("int8", "tensor", dynamic=True)), (35, 48),
    ),
    "w8a16": (SCHEMES["w8a16"], (93, 75)),
    "w8a16_asymmetric": (Scheme("w8a16", INT8_ASYMMETRIC), (17, 19)),
    "w8a16_groups": (W4A16.with_weight(element="int8", group_size=32), (31, 96)),
    "w4a16": (W4A16.with_weight(group_size=32), (93, 96)),
    "w4a16_wide": (W4A16.with_weight(group_size=192), (70, 384)),
    "w4a16_asymmetric": (W4A16.with_weight(group_size=64, symmetric=False), (600, 192)),
    "w4a16_asymmetric_signed": (W4A16.with_weight(group_size=64, symmetric=False), (75, 192)),
    "w4a16_ragged": (W4A16.with_weight(group_size=64), (5, 100)),
    "w4a16_channel": (W4A16.with_weight(granularity="channel", group_size=None), (9, 64)),
    "w3a16": (SCHEMES["w3a16"].with_weight(group_size=32), (21, 96)),
    "w2a16": (SCHEMES["w2a16"].with_weight(group_size=32, symmetric=False), (21, 96)),
    "w3a16_asymmetric": (SCHEMES["w3a16"].with_weight(group_size=32, symmetric=False), (22, 96)),
    "w4a8_dynamic": (SCHEMES["w4a8_dynamic"], (33, 50)),
    "w4a4_dynamic": (SCHEMES["w4a4_dynamic"], (33, 50)),
    "w4a8_awq": (SCHEMES["w4a8_awq"].with_weight(group_size=32), (33, 64)),
    "nvfp4": (SCHEMES["nvfp4"], (35, 80)),
    "nvfp4a16": (SCHEMES["nvfp4a16"], (35, 80)),
    "mxfp4": (SCHEMES["mxfp4"], (35, 96)),
    "mxfp4a16": (SCHEMES["mxfp4a16"], (35, 96)),
    "mxfp8": (SCHEMES["mxfp8"], (35, 96)),
}  # fmt: skip


def random_weight(
    scheme: Scheme, shape: tuple[int, int], device: torch.device = CPU
) -> QuantWeight:
    """Codes, scales and zero points over the whole range of a scheme."""
    with torch.device(device):
        return _random_weight(scheme, shape, torch.Generator(device).manual_seed(sum(shape)))


def _random_weight(
    scheme: Scheme, shape: tuple[int, int], generator: torch.Generator
) -> QuantWeight:
    number, grid = scheme.weight, scheme.weight.scale_shape(shape)
    scale = torch.rand(grid, generator=generator) * 0.02 + 0.001
    zero = None
    if number.is_int:
        unsigned = torch.randint(0, 1 << number.bits, shape, generator=generator)
        q = unsigned.to(torch.uint8)
        zero = torch.full(grid, float(1 << (number.bits - 1)))
        if not number.symmetric:
            zero = torch.randint(0, 1 << number.bits, grid, generator=generator).float()
        if shape[0] % 2:  # the signed spelling, as compressed-tensors has it
            half = 1 << (number.bits - 1)
            q, zero = (unsigned - half).to(torch.int8), zero - half
    elif number.element == "fp8_e4m3":
        q = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        q = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    if number.scale == "e8m0":
        scale = torch.exp2(torch.randint(-9, -3, grid, generator=generator).float())
    elif number.scale == "e4m3":
        scale = (scale * 1000).to(torch.float8_e4m3fn).float()
    static = scheme.input is not None and (not scheme.input.dynamic or scheme.input.scale == "e4m3")
    return QuantWeight(
        format=number,
        q=q,
        scale=scale,
        zero_point=zero,
        global_scale=torch.tensor(3e-3).double() if number.scale == "e4m3" else None,
        input_scale=torch.tensor([2e-2]) if static else None,
    )


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """By search over the eight magnitudes; a tie goes to the even code."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    distance = (values.abs().unsqueeze(-1) - magnitudes).abs()
    least = distance.min(-1, keepdim=True).values
    codes = torch.arange(8)
    best = torch.where(distance == least, codes % 2 * 8 + codes, 99).argmin(-1)
    return magnitudes[best] * values.sign()


def quantized_input(x: torch.Tensor, scheme: Scheme, weight: QuantWeight) -> torch.Tensor:
    """What the scheme makes of x, written from its definition, float64."""
    number, values = scheme.input, x.double()
    if number is None:
        return values
    static = None if weight.input_scale is None else weight.input_scale.double()
    top = {"fp8_e4m3": 448.0, "int8": 127.0, "int4": 7.0, "fp4_e2m1": 6.0}[number.element]
    if number.granularity == "group":
        assert number.group_size
        padded = torch.nn.functional.pad(values, (0, -x.shape[1] % number.group_size))
        cells = padded.view(x.shape[0], -1, number.group_size)
    else:
        cells = values.unsqueeze(1)
    largest = cells.abs().amax(-1, keepdim=True)
    outer = 1.0
    if number.scale == "e4m3":
        assert static is not None
        outer = float(static)
        scale = (largest / top / outer).float().to(torch.float8_e4m3fn).double()
        scale[scale == 0] = torch.inf
    elif number.scale == "e8m0" and top == 6:
        whole = torch.exp2(torch.floor(torch.log2(largest)))
        scale = torch.where(largest / whole >= 1.75, whole * 2, whole) / 4
    elif number.scale == "e8m0":
        scale = torch.exp2(torch.ceil(torch.log2(largest / top)))
    elif static is not None:
        scale = static.reshape(1, 1, 1)
    else:
        scale = largest.amax() if number.granularity == "tensor" else largest
        scale = (scale / top).expand_as(largest)
    scaled = cells / scale / outer
    if number.element == "fp4_e2m1":
        codes = nearest_e2m1(scaled.clamp(-top, top))
    elif number.element == "fp8_e4m3":
        codes = scaled.float().clamp(-top, top).to(torch.float8_e4m3fn).double()
    else:
        codes = scaled.round().clamp(-top - 1, top)
    finite = torch.where(scale.isinf(), 0, scale)
    return (codes * finite * outer).flatten(1)[:, : x.shape[1]]


def layer_of(
    name: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[LayerDescription, QuantWeight]:
    scheme, shape = SHAPES[name]
    weight = centred(random_weight(scheme, shape))
    return describe(name, scheme, weight, dtype), weight
