"""Activations are rounded where the engine rounds them, on the GPU that is here or another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.engines import gpu_named
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.linear.kernels.select import names
from quantkit.runtime.load import load
from quantkit.runtime.loading.as_served import as_served, gpu_to_serve, rounded_scales
from quantkit.runtime.loading.make_layers import notes_as_served
from tests.support.kernels import random_weight
from tests.support.rtn import rtn

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
    on_hopper = served(layout, spec, "h200")
    assert on_hopper.input is None
    assert on_hopper.weight == spec.scheme.weight
    assert served(layout, spec, "b200") == spec.scheme
    assert as_served(layout, spec, None, "l", spec.shape) == spec.scheme


def served(layout: str, spec: LayerSpec, gpu: str, name: str = "l") -> Scheme:
    return as_served(layout, spec, gpu_named(gpu), name, spec.shape)


def test_eight_bits_keep_their_activations_on_hopper() -> None:
    for name in ("fp8", "fp8_dynamic", "w8a8", "w8a8_dynamic"):
        spec = LayerSpec(SCHEMES[name], "", (128, 128))
        assert served("compressed-tensors", spec, "h100") == spec.scheme
    ampere = served("compressed-tensors", LayerSpec(SCHEMES["fp8"], "", (128, 128)), "a100")
    assert ampere.input is None


def test_blocks_are_computed_with_the_scales_that_deepgemm_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Hopper, in layers that its kernel takes, and unless vLLM's own variable says otherwise."""
    declared = SCHEMES["fp8_block"]
    spec = LayerSpec(declared, "", (192, 256))
    rounded = served("compressed-tensors", spec, "h100")
    assert (rounded.weight, rounded.name) == (declared.weight, declared.name)
    assert declared.input is not None
    assert rounded.input == replace(declared.input, scale="e8m0")
    others = (
        served("compressed-tensors", replace(spec, shape=(96, 256)), "h100"),
        served("compressed-tensors", replace(spec, shape=(192, 192)), "h100"),
        served("compressed-tensors", spec, "h100", "model.layers.0.mlp.experts.1.w1"),
        served("compressed-tensors", spec, "b200"),
    )
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM_E8M0", "0")
    kept = served("compressed-tensors", spec, "h100")
    assert (*others, kept) == (declared,) * 5


def test_rounded_scales_hold_every_value() -> None:
    """Powers of two, at most twice the scale before; the values within an FP8 step of what they
    were, and unchanged where the scale was a power of two already."""
    scheme = SCHEMES["fp8_block"]
    weight = random_weight(scheme, (192, 320))
    before, after = (dequantize(one) for one in (weight, rounded_scales(weight)))
    again = rounded_scales(weight)
    assert torch.equal(again.scale.log2(), again.scale.log2().round())
    assert again.q.dtype == torch.float8_e4m3fn
    assert bool(again.q.float().isfinite().all())
    step = before.abs() / 16 + again.scale.max() * 2**-10
    assert bool(((after - before).abs() <= step).all())
    assert torch.equal(dequantize(rounded_scales(again)), after)


def test_a_model_of_blocks_says_that_scales_are_rounded(small_model: Path, tmp_path: Path) -> None:
    """`--as-on h100` on a CPU: gate and up together have 64-fold outputs, 576 columns do not."""
    made = rtn(small_model, tmp_path / "made", SCHEMES["fp8_block"])
    plain, hopper = load(made, device="cpu"), load(made, device="cpu", as_on="h100")
    assert notes_as_served(plain.layers) == []
    (note,) = notes_as_served(hopper.layers)
    assert "fp8_block are rounded to powers of two" in note
    rounded = {one.module.rpartition(".")[2] for one in hopper.layers if not one.scales_as_declared}
    assert rounded == {"down_proj"}
    ids = torch.arange(32)[None]
    assert not torch.equal(plain(ids).logits, hopper(ids).logits)


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
