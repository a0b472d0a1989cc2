"""Every kernel against the scheme's own arithmetic in float64, on ragged shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.linear.activations import round_groups
from quantkit.runtime.linear.description import (
    centred,
    contiguous_groups,
    describe,
)
from quantkit.runtime.linear.kernels import int8_cpu, int8_float_cpu, int8_vllm, reference
from quantkit.runtime.linear.kernels.base import GPU_ONLY, Kernel
from quantkit.runtime.linear.kernels.select import KERNELS, choose
from quantkit.runtime.linear.modules import PlainLinear
from quantkit.runtime.network.norm import rms_norm
from tests.support.kernels import CPU, ROWS, SHAPES, W4A16, layer_of, quantized_input, random_weight


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
    columns = x[:1].mT.contiguous().mT  # as state-space layers give them
    assert torch.equal(layer(columns), layer(x[:1]))
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
