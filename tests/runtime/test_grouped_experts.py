"""All experts of a layer as one product: refusals everywhere, the sums of one by one on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.runtime.linear.description import centred, describe
from quantkit.runtime.linear.grouped import marlin_moe_vllm, plain_grouped_mm
from quantkit.runtime.linear.grouped.base import GroupedKernel, sort_by_expert
from quantkit.runtime.linear.grouped.select import KERNELS, group, kernels_of_experts
from quantkit.runtime.linear.kernels.base import GPU_ONLY
from quantkit.runtime.linear.kernels.select import choose, names
from quantkit.runtime.linear.modules import PlainLinear, QuantLinear
from quantkit.runtime.load import load
from quantkit.runtime.network.decoder import Decoder
from quantkit.runtime.network.experts import GroupedExperts
from quantkit.runtime.network.graph import one_by_one
from quantkit.runtime.network.mlp import silu_mul
from tests.support.families import model
from tests.support.kernels import CPU, random_weight

GPU = torch.device("cuda")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HIDDEN, WIDE, EXPERTS = 256, 128, 6
SERVED = {
    "bf16": "plain_grouped_mm",
    "fp8": "fp8_scaled_grouped_mm",
    "fp8_dynamic": "fp8_scaled_grouped_mm",
    "w4a16": "marlin_moe_vllm",
    "nvfp4a16": "marlin_moe_vllm",
}


def plain_weight(number: int, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    values: torch.Tensor = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    return values.bfloat16()


def layers(name: str, shape: tuple[int, int], device: torch.device) -> list[nn.Module]:
    """That layer of every expert."""
    made: list[nn.Module] = []
    for number in range(EXPERTS):
        if name == "bf16":
            made.append(PlainLinear(plain_weight(number, shape).to(device), None))
            continue
        scheme = SCHEMES[name]
        weight = centred(random_weight(scheme, shape, device))
        layer = describe(f"experts.{number}", scheme, weight, torch.bfloat16)
        choice = choose(layer, device, kernels_of_experts(scheme, device))
        made.append(QuantLinear(layer, choice, weight, None))
    return made


def routed(tokens: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    scores[:, 4] = 0  # an expert that nobody asks for
    weights, chosen = scores.topk(k)
    return hidden.to(device), chosen.to(device), weights.to(device)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.gpu
@ON_GPU
@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("name", SERVED)
def test_grouped_experts_compute_what_each_does_by_itself(name: str, tokens: int) -> None:
    ups, downs = layers(name, (2 * WIDE, HIDDEN), GPU), layers(name, (HIDDEN, WIDE), GPU)
    made = group(ups, downs, GPU)
    if made is None:
        pytest.skip("; ".join(filter(None, (one.unavailable(GPU) for one in KERNELS))) or name)
    assert SERVED[name] == made.kernel.NAME
    hidden, chosen, weights = routed(tokens, 2, GPU)
    wanted = GroupedExperts(ups, downs, silu_mul)(hidden, chosen, weights)
    found = GroupedExperts(ups, downs, silu_mul, made)(hidden, chosen, weights)
    assert difference(found, wanted) < 2e-2


@pytest.mark.gpu
@ON_GPU
@torch.inference_mode()
@pytest.mark.parametrize("name", SERVED)
def test_grouped_experts_can_be_captured(name: str) -> None:
    ups, downs = layers(name, (2 * WIDE, HIDDEN), GPU), layers(name, (HIDDEN, WIDE), GPU)
    made = group(ups, downs, GPU)
    if made is None:
        pytest.skip("; ".join(filter(None, (one.unavailable(GPU) for one in KERNELS))) or name)
    experts = GroupedExperts([], [], silu_mul, made)
    given = routed(2, 2, GPU)
    wanted = experts(*given)  # compiles, and lets libraries set themselves up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = experts(*given)
    graph.replay()
    assert torch.equal(found, wanted)


@torch.inference_mode()
def test_the_products_of_torch_are_those_of_each_expert() -> None:
    up, down = (2 * WIDE, HIDDEN), (HIDDEN, WIDE)
    hidden, chosen, weights = routed(7, 2, CPU)
    one_by_one = GroupedExperts(layers("bf16", up, CPU), layers("bf16", down, CPU), silu_mul)
    wanted = one_by_one(hidden, chosen, weights)
    packed = tuple(
        plain_grouped_mm.Packed(torch.stack([plain_weight(n, shape) for n in range(EXPERTS)]))
        for shape in (up, down)
    )
    found = plain_grouped_mm.apply(hidden, chosen, weights, (packed[0], packed[1]), silu_mul)
    assert difference(found, wanted) < 1e-2


def test_rows_are_sorted_by_expert() -> None:
    rows = sort_by_expert(torch.tensor([[3, 0], [0, 5], [3, 1]]), EXPERTS)
    assert rows.experts.tolist() == [0, 0, 1, 3, 3, 5]
    assert rows.order.tolist() == [1, 2, 5, 0, 4, 3]
    assert rows.ends.tolist() == [2, 3, 3, 5, 5, 6]
    assert rows.ends.dtype == torch.int32


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.NAME)
def test_refusals_need_no_gpu(kernel: GroupedKernel) -> None:
    assert kernel.unavailable(CPU) == GPU_ONLY
    mixed = [*layers("bf16", (64, 64), CPU)[:1], *layers("fp8", (64, 64), CPU)[:1]]
    reason = kernel.rejects(mixed)
    assert reason is not None
    assert "takes layers of" in reason


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layers: setattr(layers[1], "bias", torch.zeros(64)), "no biases"),
        (lambda layers: setattr(layers[1], "weight", torch.zeros(32, 64)), "one shape"),
        (lambda layers: layers.append(nn.Identity()), "no Identity"),
    ],
)
def test_unlike_experts_are_refused(change: object, why: str) -> None:
    made: Sequence[nn.Module] = layers("bf16", (64, 64), CPU)
    assert callable(change)
    change(made)
    reason = plain_grouped_mm.rejects(made)
    assert reason is not None
    assert why in reason
    assert group(made, made, CPU) is None


def test_marlin_comes_first_for_experts_that_it_computes_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an H200 Machete came first, and no layer of experts was one product."""
    assert kernels_of_experts(SCHEMES["w4a16"], CPU) == []
    monkeypatch.setattr(marlin_moe_vllm, "unavailable", lambda _: None)
    assert kernels_of_experts(SCHEMES["w4a16"], GPU)[0] == "marlin_vllm"
    assert sorted(kernels_of_experts(SCHEMES["w4a16"], GPU)) == sorted(names())
    assert kernels_of_experts(SCHEMES["w8a16"], GPU) == []


def test_steps_whose_experts_the_cpu_picks_are_not_captured(tmp_path: Path) -> None:
    """Such a capture ended in "Cannot copy between CPU and CUDA tensors"."""
    for family, alone in (("mixtral", True), ("llama", False)):
        network = load(model(family, tmp_path / family), device="cpu").network
        assert isinstance(network, Decoder)
        assert one_by_one(network) == alone
