"""Kernels for GPUs: refusals everywhere; where there is a GPU, every kernel against float64.

Shapes are ragged ones and those of real layers, up to a 70 B Llama's down projection; rows from one
to 4096. Memory that a kernel leaves unwritten holds NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES, NumberFormat, Scheme
from quantkit.errors import InputError
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.linear.activations import quantize_codes, round_groups
from quantkit.runtime.linear.description import LayerDescription, centred, describe
from quantkit.runtime.linear.kernels.base import GPU_ONLY, Kernel
from quantkit.runtime.linear.kernels.select import KERNELS, choose
from quantkit.runtime.load import check_one_device
from quantkit.runtime.network.decoder import Decoder
from quantkit.runtime.network.devices import shares
from quantkit.runtime.network.graph import DecodeGraph, unsupported
from quantkit.runtime.network.mlp import Mlp
from tests.support.kernels import CPU, random_weight

GPU = torch.device("cuda")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU_KERNELS = [kernel for kernel in KERNELS if kernel.unavailable(CPU) == GPU_ONLY]

W4A16 = SCHEMES["w4a16"]
W8A16 = SCHEMES["w8a16"]
BLOCKS = SCHEMES["fp8_block"]
IN_GROUPS = {"granularity": "group", "group_size": 128}
SCHEMES_HERE: dict[str, Scheme] = {
    "fp8": SCHEMES["fp8"],
    "fp8_tensor_dynamic": replace(
        SCHEMES["fp8"], input=NumberFormat("fp8_e4m3", "tensor", dynamic=True)
    ),
    "fp8_dynamic": SCHEMES["fp8_dynamic"],
    "fp8_block": SCHEMES["fp8_block"],
    "fp8_block_rounded": replace(
        BLOCKS,
        input=replace(BLOCKS.input, scale="e8m0"),  # type: ignore[type-var]
    ),
    "fp8_block_weight_only": SCHEMES["fp8_block_weight_only"],
    "w8a8": SCHEMES["w8a8"],
    "w8a8_dynamic": SCHEMES["w8a8_dynamic"],
    "w4a16_g32": W4A16.with_weight(group_size=32),
    "w4a16_g64": W4A16.with_weight(group_size=64),
    "w4a16_g128": W4A16,
    "w4a16_channel": W4A16.with_weight(granularity="channel", group_size=None),
    "w4a16_asymmetric": W4A16.with_weight(group_size=64, symmetric=False),
    "w8a16": W8A16,
    "w8a16_asymmetric": W8A16.with_weight(symmetric=False),
    "w8a16_groups": W8A16.with_weight(**IN_GROUPS),
    "nvfp4": SCHEMES["nvfp4"],
    "nvfp4a16": SCHEMES["nvfp4a16"],
    "mxfp4": SCHEMES["mxfp4"],
    "mxfp4a16": SCHEMES["mxfp4a16"],
    "mxfp8a16": SCHEMES["mxfp8a16"],
}
SHAPES = (
    (33, 96), (77, 160), (77, 320), (200, 384), (1000, 1088), (576, 1536), (1536, 576), (960, 576),
    (4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336), (8192, 28672),
)  # fmt: skip
ROWS = (1, 2, 3, 7, 17, 33, 65, 300)
MANY_ROWS = 4096


def layer_of(name: str, shape: tuple[int, int]) -> LayerDescription:
    scheme = SCHEMES_HERE[name]
    return LayerDescription(name, scheme, shape, torch.bfloat16, not scheme.weight.symmetric)


FITTING = [
    pytest.param(kernel, name, id=f"{kernel.NAME}-{name}")
    for kernel in GPU_KERNELS
    for name in SCHEMES_HERE
    if any(kernel.rejects(layer_of(name, shape)) is None for shape in SHAPES)
]


def test_every_scheme_has_a_kernel_of_its_own() -> None:
    served = {name for param in FITTING for name in param.values[1:]}
    assert served == set(SCHEMES_HERE)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def quantized_input(x: torch.Tensor, scheme: Scheme, scale: torch.Tensor | None) -> torch.Tensor:
    """x as the scheme's activations, float64 (these functions have tests of their own)."""
    number = scheme.input
    if number is None:
        return x.double()
    if number.scale != "float":
        outer = 1.0 if scale is None else scale.double()
        return round_groups(x, number, scale).double() * outer
    codes = quantize_codes(x, number, scale)
    values = codes.values.double()
    if number.granularity != "group":
        return values * codes.scale.double()
    assert number.group_size
    return values * codes.scale.double().repeat_interleave(number.group_size, dim=1)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize(("kernel", "name"), FITTING)
def test_kernel_computes_the_scheme(
    kernel: Kernel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    reason = kernel.unavailable(GPU)
    if reason is not None:
        pytest.skip(f"{kernel.NAME}: {reason}")
    generator = torch.Generator(GPU).manual_seed(1)
    computed = 0
    for shape in SHAPES:
        if kernel.rejects(layer_of(name, shape)) is not None:
            continue
        weight = random_weight(SCHEMES_HERE[name], shape, GPU)
        prepared = centred(weight)
        layer = describe(name, SCHEMES_HERE[name], prepared, torch.bfloat16)
        packed = kernel.prepare(prepared, layer)
        exact = dequantize(weight).double()
        rows = (*ROWS, MANY_ROWS) if min(shape) >= MANY_ROWS else ROWS
        for count in rows:
            x = torch.randn(count, shape[1], generator=generator, device=GPU).bfloat16()
            wanted = quantized_input(x, layer.scheme, weight.input_scale) @ exact.T
            with poisoned():
                found = kernel.apply(x, packed)
            assert found.dtype == torch.bfloat16
            assert found.is_contiguous()
            error = float((found.double() - wanted).norm() / wanted.norm())
            coarse = layer.scheme.input is not None and layer.scheme.input.bits == 4
            limit = 2e-2 if coarse else 6e-3
            assert error < limit, f"{shape}, {count} rows: relative error {error:.4f}"
            computed += 1
    assert computed


@pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda kernel: kernel.NAME)
def test_refusals_need_no_gpu(kernel: Kernel) -> None:
    assert kernel.unavailable(CPU) == GPU_ONLY
    if not torch.cuda.is_available():
        assert kernel.unavailable(GPU) == "this torch sees no GPU"
    for name, scheme in SCHEMES.items():
        for shape in ((64, 256), (7, 256), (64, 130)):
            layer = LayerDescription(name, scheme, shape, torch.bfloat16)
            reason = kernel.rejects(layer)
            assert reason is None or len(reason) > 10
            if reason is None:
                wide = kernel.rejects(replace(layer, dtype=torch.float32))
                assert wide == "computes in bfloat16, not float32"


def test_a_gpu_layer_that_no_kernel_takes_falls_to_the_reference() -> None:
    layer = LayerDescription("l", SCHEMES["w3a16"], (64, 256), torch.bfloat16)
    choice = choose(layer, GPU)
    assert choice.kernel.NAME == "reference"
    assert {kernel.NAME for kernel in GPU_KERNELS} <= set(choice.refused)


def random_decoder(**more: Any) -> Decoder:
    """Two layers of random weights in bfloat16 on the GPU."""
    from transformers import LlamaConfig

    from quantkit.runtime.linear.modules import PlainLinear
    from quantkit.runtime.network.decoder import Block, Shape

    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, **more,
    )  # fmt: skip
    shape, device = Shape.of(config), GPU if torch.cuda.is_available() else CPU
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator, device=device)
        return (values * size[-1] ** -0.5).bfloat16() if len(size) > 1 else values.abs().bfloat16()

    def block() -> Block:
        wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        sizes = ((wide, 256), (256, shape.heads * shape.head_dim), (1024, 256), (256, 512))
        linears = tuple(PlainLinear(random(*size), None) for size in sizes)
        mlp = Mlp(*linears[2:])
        return Block(shape, 1e-5, (random(256), random(256)), None, linears[:2], mlp, None)  # type: ignore[arg-type]

    head = PlainLinear(random(300, 256), None)
    return Decoder(config, random(300, 256), [block(), block()], random(256), head)


@pytest.mark.gpu
@ON_GPU
@torch.inference_mode()
@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_captured_step_computes_what_the_decoder_does(width: int) -> None:
    network = random_decoder(head_dim=width)
    assert unsupported(network) is None
    graph = DecodeGraph(network, 3, 400)
    generator = torch.Generator(GPU).manual_seed(2)
    for _ in range(2):  # the second text finds the first one's keys in the cache
        ids = torch.randint(3, 300, (3, 330), generator=generator, device=GPU)
        mask = torch.ones_like(ids)
        mask[1, :200] = mask[2, :3] = 0
        whole = network(ids, mask)
        graph.begin()
        found = [graph.forward(ids[:, :290], mask[:, :290]).clone()]
        found += [
            graph.forward(ids[:, at : at + 1], mask[:, : at + 1]).clone() for at in range(290, 330)
        ]
        error = (torch.cat(found, 1) - whole[:, 289:]).double().norm() / whole[:, 289:].norm()
        assert error < 2e-2, f"relative error {float(error):.4f}"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@torch.inference_mode()
def test_layers_on_two_gpus_compute_what_they_do_on_one() -> None:
    network = random_decoder()
    ids = torch.randint(3, 300, (3, 40), device=GPU)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    wanted, masked = network(ids), network(ids, mask)
    divided = random_decoder()
    divided.blocks[1].to("cuda:1")
    assert len(set(divided.devices)) == 2
    assert unsupported(divided) == "its layers are on several devices"
    torch.testing.assert_close(divided(ids), wanted, rtol=0, atol=0)
    torch.testing.assert_close(divided(ids, mask), masked, rtol=0, atol=0)
    cache = divided.new_cache(3, 40)
    found = [divided(ids[:, :30], None, cache)]
    found += [divided(ids[:, at : at + 1], None, cache) for at in range(30, 40)]
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0.05, atol=0.05)
    assert torch.cuda.current_device() == 0


def test_layers_are_divided_evenly() -> None:
    one, two, three = (torch.device("cuda", index) for index in range(3))
    assert shares(4, [one, two]) == [one, one, two, two]
    assert shares(5, [one, two, three]) == [one, one, two, two, three]
    assert shares(2, [one]) == [one, one]


def test_networks_that_transformers_computes_stay_on_one_device() -> None:
    check_one_device([CPU], "its activation is gelu")
    with pytest.raises(InputError, match=r"on one device, not on cuda:0, cuda:1: its activation"):
        check_one_device([torch.device("cuda", n) for n in range(2)], "its activation is gelu")


def test_a_step_is_not_captured_without_a_gpu() -> None:
    if torch.cuda.is_available():
        assert (
            unsupported(random_decoder(head_dim=96)) == "needs a power of two as head_dim, not 96"
        )
    else:
        assert unsupported(random_decoder()) == GPU_ONLY
