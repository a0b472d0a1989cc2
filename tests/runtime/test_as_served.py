"""Activations are rounded where the engine rounds them, on the GPU that is here or another one."""

from __future__ import annotations

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.engines import gpu_named
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec
from quantkit.runtime.linear.kernels.select import names
from quantkit.runtime.loading.as_served import as_served, gpu_to_serve

CPU = torch.device("cpu")

CASES = (
    ("compressed-tensors", "nvfp4", "nvfp4-pack-quantized"),
    ("compressed-tensors", "mxfp4", "mxfp4-pack-quantized"),
    ("compressed-tensors", "mxfp8", "mxfp8-quantized"),
    ("modelopt", "nvfp4", "NVFP4"),
    ("modelopt", "mxfp8", "MXFP8"),
)
"""Served by Marlin on an H100, measured there: layout, scheme, packing."""


@pytest.mark.parametrize(("layout", "scheme", "packing"), CASES)
def test_four_bits_and_mxfp8_are_weight_only_on_hopper(
    layout: str, scheme: str, packing: str
) -> None:
    spec = LayerSpec(SCHEMES[scheme], packing, (128, 128))
    on_hopper = as_served(layout, spec, gpu_named("h200"))
    assert on_hopper.input is None
    assert on_hopper.weight == spec.scheme.weight
    assert as_served(layout, spec, gpu_named("b200")) == spec.scheme
    assert as_served(layout, spec, None) == spec.scheme


def test_eight_bits_keep_their_activations_on_hopper() -> None:
    for name in ("fp8", "fp8_dynamic", "fp8_block", "w8a8", "w8a8_dynamic"):
        spec = LayerSpec(SCHEMES[name], "", (128, 128))
        assert as_served("compressed-tensors", spec, gpu_named("h100")) == spec.scheme
    ampere = as_served(
        "compressed-tensors", LayerSpec(SCHEMES["fp8"], "", (128, 128)), gpu_named("a100")
    )
    assert ampere.input is None


def test_a_gpu_is_named_or_the_one_here() -> None:
    assert gpu_to_serve("", CPU) is None
    named = gpu_to_serve("b200", CPU)
    assert named is not None
    assert named.capability == 100
    for wrong, said in (("mi300x", "--as-on mi300x"), ("h1000", "--as-on h1000 is not known")):
        with pytest.raises(InputError, match=said):
            gpu_to_serve(wrong, CPU)


def test_engine_kernels_come_before_ours_on_a_gpu() -> None:
    order = names()
    for engines in ("cutlass_vllm", "marlin_vllm", "fp8_scaled_mm"):
        for ours in ("fp8_block_triton", "int8_triton", "int4_triton", "weight8_triton",
                     "fp4_triton"):  # fmt: skip
            assert order.index(engines) < order.index(ours)
