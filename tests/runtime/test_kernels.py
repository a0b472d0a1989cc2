"""Every kernel against the scheme's own arithmetic in float64, on ragged shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES, NumberFormat, Scheme
from quantkit.errors import InputError
from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.linear.activations import round_groups
from quantkit.runtime.linear.description import (
    LayerDescription,
    centred,
    contiguous_groups,
    describe,
)
from quantkit.runtime.linear.kernels import int8_cpu, int8_float_cpu, int8_vllm, reference
from quantkit.runtime.linear.kernels.base import GPU_ONLY, Kernel
from quantkit.runtime.linear.kernels.select import KERNELS, choose, names
from quantkit.runtime.linear.modules import PlainLinear
from quantkit.runtime.network.norm import rms_norm

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


@pytest.mark.usefixtures("operators")
def test_norms_and_products_of_vllm_are_torchs() -> None:
    generator = torch.Generator().manual_seed(5)
    x, weight, plain = (torch.randn(*shape, generator=generator).bfloat16()
                        for shape in ((3, 7, 64), (96, 64), (64,)))  # fmt: skip
    layer = PlainLinear(weight, None)
    assert layer.kept is not None
    assert layer.outside_bytes == weight.nbytes
    exact = x.float() @ weight.float().T
    assert float((layer(x).float() - exact).norm() / exact.norm()) < 4e-3
    normed = torch.nn.functional.rms_norm(x.float(), (64,), plain.float(), 1e-5)
    assert float((rms_norm(x, plain, 1e-5).float() - normed).norm() / normed.norm()) < 4e-3


def runs_or_says_why(kernel: Kernel) -> None:
    """Skip what this CPU lacks the instructions for."""
    reason = kernel.unavailable(CPU)
    if reason is not None:
        pytest.skip(f"{kernel.NAME}: {reason}")


FITTING = [
    pytest.param(kernel, name, id=f"{kernel.NAME}-{name}")
    for kernel in KERNELS
    for name in SHAPES
    if kernel.unavailable(CPU) != GPU_ONLY and kernel.rejects(layer_of(name)[0]) is None
]


@pytest.mark.parametrize(("kernel", "name"), FITTING)
def test_kernel_computes_the_scheme(
    kernel: Kernel, name: str, request: pytest.FixtureRequest
) -> None:
    if kernel.NAME == "int8_vllm":
        request.getfixturevalue("operators")
    runs_or_says_why(kernel)
    layer, prepared = layer_of(name)
    weight = random_weight(*SHAPES[name])
    packed = kernel.prepare(prepared, layer)
    for rows in ROWS:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, layer.shape[1], generator=generator).bfloat16()
        weights_only = kernel.NAME == "dequantized"
        values = x.double() if weights_only else quantized_input(x, layer.scheme, weight)
        wanted = values @ dequantize(weight).double().T
        found = kernel.apply(x, packed)
        assert found.dtype == torch.bfloat16
        assert found.is_contiguous()
        error = (found.double() - wanted).norm() / wanted.norm()
        coarse = layer.scheme.input is not None and layer.scheme.input.bits == 4
        limit = 2e-2 if coarse else 6e-3  # one code that a tie rounds the other way
        assert error < limit, f"{rows} rows: relative error {error:.4f}"


@pytest.mark.parametrize("off", [-3, -1, 0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_zero_point_for_all_groups_does_not_take_codes_out_of_their_bits(
    bits: int, off: int
) -> None:
    scheme = W4A16.with_weight(element=f"int{bits}", group_size=32, symmetric=False)
    weight = random_weight(scheme, (64, 96))
    assert weight.zero_point is not None
    middle = 1 << (bits - 1)
    weight = replace(weight, zero_point=torch.full_like(weight.zero_point, float(middle + off)))
    prepared = centred(weight)
    assert (prepared.zero_point is None) == (off == 0)
    layer = describe("x", scheme, prepared, torch.bfloat16)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = x.double() @ dequantize(weight).double().T
    fitting = [k for k in KERNELS if not k.unavailable(CPU) and not k.rejects(layer)]
    assert "reference" in {kernel.NAME for kernel in fitting}
    for kernel in fitting:
        found = kernel.apply(x, kernel.prepare(prepared, layer)).double()
        assert (found - wanted).norm() / wanted.norm() < 6e-3, kernel.NAME


@pytest.mark.parametrize("name", SHAPES)
def test_reference_is_exact_in_float32(name: str) -> None:
    layer, prepared = layer_of(name, torch.float32)
    weight = random_weight(*SHAPES[name])
    kernel = choose(layer, CPU, ["reference"]).kernel
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, layer.shape[1], generator=generator)
    wanted = quantized_input(x, layer.scheme, weight) @ dequantize(weight).double().T
    found = kernel.apply(x, kernel.prepare(prepared, layer))
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize(
    "kernel", [int8_cpu, int8_vllm, int8_float_cpu], ids=lambda kernel: kernel.NAME
)
def test_a_row_of_zeros_stays_zero(kernel: Kernel, request: pytest.FixtureRequest) -> None:
    if kernel is int8_vllm:
        request.getfixturevalue("operators")
    runs_or_says_why(kernel)
    layer, weight = layer_of("w8a8_dynamic")
    x = torch.randn(3, layer.shape[1]).bfloat16()
    x[1] = 0
    found = kernel.apply(x, kernel.prepare(weight, layer))
    assert bool((found[1] == 0).all())
    assert bool(found.isfinite().all())


def test_a_dynamic_scale_of_the_tensor_is_that_of_all_rows() -> None:
    layer, prepared = layer_of("w8a8_dynamic_tensor")
    x = torch.randn(300, layer.shape[1], generator=torch.Generator().manual_seed(4)).bfloat16()
    x[0] *= 30  # in the first block of rows; the others have the same scale
    weight = random_weight(*SHAPES["w8a8_dynamic_tensor"])
    wanted = quantized_input(x, layer.scheme, weight) @ dequantize(weight).double().T
    fitting = [k for k in KERNELS if not k.unavailable(CPU) and not k.rejects(layer)]
    assert "reference" in {kernel.NAME for kernel in fitting}
    for kernel in fitting[:-1]:  # the last one, dequantized, does not quantize activations
        found = kernel.apply(x, kernel.prepare(prepared, layer)).double()
        tail = (found[256:] - wanted[256:]).norm() / wanted[256:].norm()
        assert tail < 2e-2, kernel.NAME


def test_static_int8_input_with_a_zero_point() -> None:
    scheme = SCHEMES["w8a8"]
    weight = replace(random_weight(scheme, (40, 72)), input_zero_point=torch.tensor([-13.0]))
    assert weight.input_scale is not None
    assert weight.input_zero_point is not None
    layer = describe("x", scheme, centred(weight), torch.bfloat16)
    x = torch.randn(5, 72, generator=torch.Generator().manual_seed(2)).bfloat16()
    codes = (x.double() / weight.input_scale.double()).round() + weight.input_zero_point.double()
    values = (codes.clamp(-128, 127) - weight.input_zero_point) * weight.input_scale.double()
    wanted = values @ dequantize(weight).double().T
    for kernel in (int8_cpu, int8_float_cpu, reference):
        if kernel.unavailable(CPU) is not None:
            continue  # int8_cpu, where sums saturate
        assert kernel.rejects(layer) is None
        found = kernel.apply(x, kernel.prepare(centred(weight), layer)).double()
        assert (found - wanted).norm() / wanted.norm() < 6e-3, kernel.NAME


def test_act_order_is_undone_by_ordering_the_input() -> None:
    scheme, shape = SHAPES["w4a16_asymmetric"]
    groups = torch.arange(shape[1]) // 64
    mixed = groups[torch.randperm(shape[1], generator=torch.Generator().manual_seed(3))].int()
    weight = replace(random_weight(scheme, shape), g_idx=mixed)
    regular, order = contiguous_groups("x", weight)
    assert order is not None
    x = torch.randn(4, shape[1])
    assert torch.allclose(x[:, order] @ dequantize(regular).T, x @ dequantize(weight).T, atol=1e-4)
    with pytest.raises(InputError) as caught:
        contiguous_groups("layer", replace(weight, g_idx=torch.zeros(shape[1], dtype=torch.int32)))
    assert caught.value.code == "runtime.group_index"


@pytest.mark.parametrize("seed", range(4))
def test_nvfp4_groups_are_exact_in_bfloat16(seed: int) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 2)
    number, scale = SCHEMES["nvfp4"].input, torch.tensor(1e-3)
    assert number is not None
    exact = round_groups(x, number, scale)
    assert torch.equal(exact.bfloat16().float(), exact)


def test_a_choice_names_every_reason() -> None:
    layer = describe("l", SCHEMES["fp8"], random_weight(SCHEMES["fp8"], (8, 8)), torch.bfloat16)
    choice = choose(layer, CPU)
    assert choice.kernel.NAME == "reference"
    assert list(choice.refused) == names()[: names().index("reference")]
    with pytest.raises(InputError) as caught:
        choose(layer, CPU, ["int4_cpu", "int8_float_cpu"])
    assert caught.value.code == "kernel.refused"
    assert "int4_cpu: computes INT4" in caught.value.message
    assert "int8_float_cpu: computes INT8" in caught.value.message
    with pytest.raises(InputError) as caught:
        choose(layer, CPU, ["cutlas"])
    assert caught.value.code == "kernel.unknown"


def test_the_dequantized_kernel_is_taken_only_when_asked_for() -> None:
    for name in SHAPES:
        layer, _ = layer_of(name)
        assert choose(layer, CPU).kernel.NAME != "dequantized"
        forced = choose(layer, CPU, ["dequantized"])
        assert forced.weights_only == (layer.scheme.input is not None)


@pytest.mark.parametrize("reason", [None, "this CPU's int8 sums saturate"])
def test_cpu_kernels_are_the_first_choice_where_they_fit(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two kinds of CPU: with VNNI or AMX, and those before, whatever this one is."""
    monkeypatch.setattr(int8_cpu, "inexact", lambda: reason)
    wanted = {"w8a8": "int8_cpu", "w8a16": "int8_weight_cpu", "w4a16": "int4_cpu"}
    for name, kernel in wanted.items():
        choice = choose(layer_of(name)[0], CPU)
        if reason is None or kernel == "int4_cpu":
            assert kernel == choice.kernel.NAME
        else:
            assert choice.kernel.NAME == "int8_float_cpu"
            assert choice.refused[kernel] == reason


@pytest.mark.parametrize("zero", [None, -128.0], ids=["symmetric", "zero point"])
def test_float32_products_of_int8_codes_are_exact_where_sums_are_largest(
    zero: float | None,
) -> None:
    """Sums over 2^24, odd on purpose, against int64: float32 alone cannot hold them."""
    columns = 4099
    generator = torch.Generator().manual_seed(7)
    q = torch.randint(100, 128, (3, columns), generator=generator).to(torch.int8)
    codes = torch.randint(100, 128, (5, columns), generator=generator)
    weight = QuantWeight(
        SCHEMES["w8a8"].weight, q, torch.ones(3, 1), input_scale=torch.ones(1),
        input_zero_point=None if zero is None else torch.tensor([zero]),
    )  # fmt: skip
    layer = describe("x", SCHEMES["w8a8"], weight, torch.float32)
    x = codes.float() - (zero or 0.0)
    found = int8_float_cpu.apply(x, int8_float_cpu.prepare(weight, layer))
    exact = (codes - int(zero or 0)) @ q.long().T
    assert int(exact.min()) > 2**24
    assert torch.equal(found, exact.float())


def test_sums_that_saturate_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `vpmaddubsw` has it: pairs of products in 16 bit."""

    def saturating(x: torch.Tensor, _: object, scale: torch.Tensor) -> torch.Tensor:
        pairs = (x.int() + 128).view(x.shape[0], -1, 2) * 127
        sums = pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1, keepdim=True)
        return (sums - 128 * 127 * x.shape[1]) * scale

    int8_cpu.inexact.cache_clear()
    monkeypatch.setattr(int8_cpu, "multiply", saturating)
    assert int8_cpu.inexact() == "this CPU's int8 sums saturate"
    int8_cpu.inexact.cache_clear()
    monkeypatch.setattr(int8_cpu, "multiply", lambda *_: torch.full((16, 16), 127.0 * 127 * 64))
    assert int8_cpu.inexact() is None
    int8_cpu.inexact.cache_clear()
