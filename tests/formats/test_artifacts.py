"""Each layout read from what its library wrote: bit for bit what the library dequantizes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.formats import registry
from quantkit.formats.base import Declaration, Format, QuantWeight, is_kv_cache_tensor
from quantkit.formats.dequantize import dequantize
from tests.support.helpers import tensor_name

Artifact = Callable[[str], Path]

LINEAR = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # fmt: skip
BLOCKS = {f"model.layers.{index}.{name}" for index in range(3) for name in LINEAR}
NOT_LAST_MLP = {name for name in BLOCKS if not name.startswith("model.layers.2.mlp")}
NOT_LAST = {name for name in BLOCKS if not name.startswith("model.layers.2.")}

CASES = {
    # artifact: (layout, declared layers, KV cache, scheme names)
    "llmcompressor/fp8_dynamic": ("compressed-tensors", NOT_LAST_MLP, "none", {"fp8_dynamic"}),
    "llmcompressor/w8a8": ("compressed-tensors", NOT_LAST_MLP, "none", {"w8a8_dynamic"}),
    "llmcompressor/w4a16": ("compressed-tensors", NOT_LAST_MLP, "none", {"w4a16"}),
    "llmcompressor/w4a16_asym": ("compressed-tensors", NOT_LAST_MLP, "none", {"w4a16"}),
    "llmcompressor/nvfp4": ("compressed-tensors", NOT_LAST_MLP, "none", {"nvfp4"}),
    "llmcompressor/mxfp4": ("compressed-tensors", NOT_LAST_MLP, "none", {"mxfp4"}),
    "llmcompressor/mixed": (
        "compressed-tensors",
        NOT_LAST_MLP,
        "fp8",
        {"mxfp8", "w8a16", "w3a16", "fp8_block_weight_only", "nvfp4a16", "fp8"},
    ),
    "modelopt/fp8_kv": ("modelopt", BLOCKS, "fp8", {"fp8"}),
    "modelopt/fp8_pc_pt": ("modelopt", BLOCKS, "none", {"fp8_dynamic"}),
    "modelopt/fp8_pb_wo": ("modelopt", BLOCKS, "none", {"fp8_block_weight_only"}),
    "modelopt/int8_sq": ("modelopt", BLOCKS, "none", {"w8a8"}),
    "modelopt/int4_awq": ("modelopt", BLOCKS, "none", {"w4a16"}),
    "modelopt/mxfp8": ("modelopt", BLOCKS, "none", {"mxfp8"}),
    "modelopt/mixed": ("modelopt", BLOCKS, "none", {"fp8", "nvfp4"}),
    "gptqmodel/w4": ("gptq", BLOCKS, "none", {"w4a16"}),
    "gptqmodel/w4_act_order": ("gptq", BLOCKS, "none", {"w4a16"}),
    "gptqmodel/w8_v2": ("gptq", BLOCKS, "none", {"w8a16"}),
    "gptqmodel/dynamic": ("gptq", NOT_LAST, "none", {"w4a16", "w8a16", "w3a16", "w2a16"}),
    "autoround/auto_gptq": ("auto-round", BLOCKS, "none", {"w4a16", "w8a16"}),
    "autoround/auto_awq": ("auto-round", BLOCKS, "none", {"w4a16"}),
    "autoround/gptqmodel": ("auto-round", BLOCKS, "none", {"w4a16"}),
    "autoround/mxfp4": ("auto-round", BLOCKS, "none", {"mxfp4"}),
    "autoround/awq": ("awq", BLOCKS, "none", {"w4a16"}),
}

ROUNDED_TO = {
    "gptqmodel": torch.float16,  # GPTQModel multiplies in the float16 of the scales
    "autoround/auto_gptq": torch.float16,
    "autoround/gptqmodel": torch.float16,
}
"""Where the library's own result is rounded to 16 bit; everywhere else float32 must be equal."""


def opened(path: Path) -> tuple[Checkpoint, Format, Declaration]:
    checkpoint = open_checkpoint(path)
    layout = registry.detect(checkpoint)
    return checkpoint, layout, layout.declare(checkpoint)


def read_layer(
    checkpoint: Checkpoint, layout: Format, declaration: Declaration, name: str
) -> QuantWeight:
    spec = declaration.layers[name]
    tensors = {
        suffix: checkpoint.tensor(f"{name}.{suffix}")
        for suffix in layout.expected(spec)
        if f"{name}.{suffix}" in checkpoint.tensors
    }
    return layout.read(tensors, spec)


@pytest.mark.parametrize("name", CASES)
def test_declaration_fits_the_tensors(artifact: Artifact, name: str) -> None:
    layout_name, layers, kv_cache, schemes = CASES[name]
    checkpoint, layout, declaration = opened(artifact(name))
    assert layout_name == layout.NAME
    assert set(declaration.layers) == layers
    assert declaration.kv_cache == kv_cache
    assert not declaration.problems
    assert not declaration.unmatched
    assert {spec.scheme.name for spec in declaration.layers.values()} == schemes

    left = dict(checkpoint.tensors)
    for module, spec in declaration.layers.items():
        for suffix, tensor in layout.expected(spec).items():
            info = left.pop(tensor_name(module, suffix, spec), None)
            if info is None:
                assert not tensor.required, f"{module} has no {suffix}"
                continue
            assert info.dtype in tensor.dtypes, f"{info.name} is {info.dtype}"
            assert info.shape in tensor.shapes, f"{info.name} is {info.shape}"
    caches = {tensor for tensor in left if is_kv_cache_tensor(tensor)}
    assert (len(caches) == 6) == (kv_cache == "fp8")
    plain = {tensor for tensor in left if tensor not in caches}
    assert all(tensor.endswith(".weight") and left[tensor].dtype == "BF16" for tensor in plain)


@pytest.mark.parametrize("name", CASES)
def test_dequantizes_as_the_library_does(artifact: Artifact, name: str) -> None:
    path = artifact(name)
    checkpoint, layout, declaration = opened(path)
    reference = load_file(path.with_name(f"{path.name}.reference.safetensors"))
    rounding = next((d for start, d in ROUNDED_TO.items() if name.startswith(start)), torch.float32)
    assert reference
    for module, theirs in reference.items():
        weight = read_layer(checkpoint, layout, declaration, module)
        ours = dequantize(weight)
        assert ours.dtype == torch.float32
        if name == "modelopt/int4_awq":
            step = weight.scale.repeat_interleave(64, dim=1)
            if weight.input_multiplier is not None:
                step = step * weight.input_multiplier
            assert (ours - theirs).abs().le(step * 0.501).all(), module
        else:
            assert torch.equal(ours.to(rounding), theirs.to(rounding)), module


def test_activation_order_is_kept_only_where_it_matters(artifact: Artifact) -> None:
    ordered = read_layer(*opened(artifact("gptqmodel/w4_act_order")), "model.layers.1.mlp.up_proj")
    plain = read_layer(*opened(artifact("gptqmodel/w4")), "model.layers.1.mlp.up_proj")
    assert ordered.g_idx is not None
    assert set(ordered.g_idx.bincount().tolist()) == {32}
    assert plain.g_idx is None


def test_static_activation_scales_are_read(artifact: Artifact) -> None:
    name = "model.layers.1.mlp.down_proj"
    for case in ("modelopt/fp8_kv", "modelopt/int8_sq", "llmcompressor/nvfp4"):
        checkpoint, layout, declaration = opened(artifact(case))
        scale = read_layer(checkpoint, layout, declaration, name).input_scale
        assert scale is not None
        stored = {n: checkpoint.tensor(n) for n in checkpoint.tensors if n.startswith(name)}
        if case == "llmcompressor/nvfp4":
            assert torch.equal(scale, 1 / stored[f"{name}.input_global_scale"])
        else:
            assert torch.equal(scale, stored[f"{name}.input_scale"])
    smoothed = read_layer(*opened(artifact("modelopt/int8_sq")), name)
    assert smoothed.input_multiplier is not None
    assert smoothed.input_multiplier.shape == (1536,)
