"""Writing: the very bytes of the library for what was read, and every scheme there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.formats import compressed_tensors, gptq
from quantkit.formats.base import LayerSpec, QuantWeight
from quantkit.formats.compressed_tensors_config import packing_of
from quantkit.formats.dequantize import dequantize
from quantkit.formats.registry import writer_named
from tests.formats.test_artifacts import opened, read_layer
from tests.support.written import WRITERS

Artifact = Callable[[str], Path]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llmcompressor/fp8_dynamic", torch.bfloat16),
        ("llmcompressor/w8a8", torch.bfloat16),
        ("llmcompressor/w4a16", torch.bfloat16),
        ("llmcompressor/w4a16_asym", torch.bfloat16),
        ("llmcompressor/nvfp4", torch.bfloat16),
        ("llmcompressor/mxfp4", torch.bfloat16),
        ("llmcompressor/mixed", torch.bfloat16),
        ("gptqmodel/w4", torch.float16),
        ("gptqmodel/w4_act_order", torch.float16),
        ("gptqmodel/w8_v2", torch.float16),
        ("gptqmodel/dynamic", torch.float16),
        ("autoround/awq", torch.float16),
    ],
)
def test_writes_the_library_s_bytes(artifact: Artifact, name: str, dtype: torch.dtype) -> None:
    checkpoint, layout, declaration = opened(artifact(name))
    for module in [m for m in declaration.layers if ".layers.1." in m]:
        weight = read_layer(checkpoint, layout, declaration, module)
        weight = replace(weight, input_scale=None)
        written = WRITERS[layout.NAME](weight, declaration.layers[module], dtype)
        stored = {
            tensor.rpartition(".")[2]: checkpoint.tensor(tensor)
            for tensor in checkpoint.tensors
            if tensor.startswith(f"{module}.") and ".input_" not in tensor
        }
        assert set(written) == set(stored)
        for suffix, tensor in stored.items():
            ours = written[suffix]
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), (module, suffix)
            assert same_bytes(ours, tensor), (module, suffix)


@pytest.mark.parametrize(
    "name", ["fp8_dynamic", "w8a8", "w4a16", "w4a16_asym", "mxfp4"]
)  # fmt: skip
def test_config_is_what_compressed_tensors_serialises(artifact: Artifact, name: str) -> None:
    path = artifact(f"llmcompressor/{name}")
    _, _, declaration = opened(path)
    theirs: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    assert compressed_tensors.quantization_config(declaration.layers, theirs["ignore"]) == theirs


def test_config_of_several_schemes_declares_them_again(artifact: Artifact, tmp_path: Path) -> None:
    source = artifact("llmcompressor/mixed")
    _, _, declaration = opened(source)
    ignored = list(declaration.ignored)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = compressed_tensors.quantization_config(
        declaration.layers, ignored
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    _, _, again = opened(tmp_path)
    assert again.layers == declaration.layers
    assert set(again.ignored) == set(ignored)
    assert not again.unmatched
    assert not again.problems


@pytest.mark.parametrize("name", ["gptqmodel/w4", "gptqmodel/w8_v2", "gptqmodel/dynamic"])
def test_gptq_config_declares_the_same_layers(
    artifact: Artifact, tmp_path: Path, name: str
) -> None:
    source = artifact(name)
    _, _, declaration = opened(source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = gptq.quantization_config(
        declaration.layers, list(declaration.ignored)
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    _, _, again = opened(tmp_path)
    assert again.layers == declaration.layers
    assert set(again.ignored) == set(declaration.ignored)
    rules = config["quantization_config"]["dynamic"]
    merged = [rule for rule in rules if "qkv_proj" in rule or "gate_up_proj" in rule]
    assert len(merged) == (2 if name == "gptqmodel/dynamic" else 0)


SEEDED = [
    ("compressed-tensors", replace(SCHEMES["fp8"], input=None), (48, 64)),
    ("compressed-tensors", SCHEMES["fp8_dynamic"], (48, 64)),
    ("compressed-tensors", SCHEMES["fp8_block"], (200, 300)),
    ("compressed-tensors", SCHEMES["w8a8_dynamic"], (48, 64)),
    ("compressed-tensors", SCHEMES["w8a8_dynamic"].with_weight(symmetric=False), (48, 64)),
    ("compressed-tensors", SCHEMES["w4a8_dynamic"], (48, 64)),
    ("compressed-tensors", SCHEMES["w8a16"], (48, 50)),
    *(
        ("compressed-tensors", SCHEMES["w4a16"].with_weight(group_size=g, symmetric=s), (50, 384))
        for g in (32, 64, 128)
        for s in (True, False)
    ),
    ("compressed-tensors", SCHEMES["w3a16"].with_weight(group_size=32), (48, 96)),
    ("compressed-tensors", SCHEMES["w2a16"].with_weight(group_size=32, symmetric=False), (48, 96)),
    ("compressed-tensors", SCHEMES["nvfp4a16"], (48, 64)),
    ("compressed-tensors", SCHEMES["mxfp4a16"], (48, 64)),
    ("compressed-tensors", SCHEMES["mxfp8"], (48, 64)),
    *(
        ("gptq", SCHEMES[name].with_weight(group_size=32, symmetric=s), (64, 96))
        for name in ("w2a16", "w3a16", "w4a16")
        for s in (True, False)
    ),
    ("gptq", SCHEMES["w8a16"], (64, 96)),
    ("awq", SCHEMES["w4a16"].with_weight(group_size=32, symmetric=False), (64, 96)),
    ("awq", SCHEMES["w4a16"].with_weight(group_size=32), (64, 96)),
]


@pytest.mark.parametrize(("layout", "scheme", "shape"), SEEDED)
def test_round_trip(layout: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Signed codes as a quantizer makes them: written, read, the same weight; specs met."""
    weight = seeded(scheme, shape)
    reader = writer_named(layout)
    packing = {"gptq": "gptq", "awq": "gemm"}.get(layout) or packing_of(scheme)
    spec = LayerSpec(scheme, packing, shape)
    written = WRITERS[layout](weight, spec, torch.bfloat16)
    for suffix, tensor in reader.expected(spec).items():
        assert suffix in written or not tensor.required
        if suffix in written:
            assert tuple(written[suffix].shape) in tensor.shapes, suffix
    again = reader.read(written, spec)
    assert torch.equal(dequantize(again), dequantize(weight))
    assert torch.equal(again.scale, weight.scale)
    assert again.bias is not None
    twice = WRITERS[layout](again, spec, torch.bfloat16)
    for suffix, first in written.items():
        assert same_bytes(twice[suffix], first), suffix


@pytest.mark.parametrize("packing", gptq.PACKINGS)
def test_gptq_zero_points_wrap(packing: str) -> None:
    """Zero point 0 is stored as -1 modulo 2^bits in the older layout."""
    spec = LayerSpec(SCHEMES["w4a16"].with_weight(group_size=32, symmetric=False), packing, (8, 32))
    weight = replace(seeded(spec.scheme, (8, 32)), zero_point=torch.full((8, 1), -8.0))
    written = WRITERS["gptq"](weight, spec, torch.float16)
    assert written["qzeros"].tolist() == [[-1 if packing == "gptq" else 0]]
    assert torch.equal(dequantize(gptq.read(written, spec)), dequantize(weight))


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bit for bit, whatever the dtype; NaN codes and signed zeros count."""
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*flat)


def seeded(scheme: Scheme, shape: tuple[int, int]) -> QuantWeight:
    """Random signed codes, scales that bfloat16, E4M3 or E8M0 holds, a bias."""
    generator = torch.Generator().manual_seed(sum(shape))
    number = scheme.weight
    grid = number.scale_shape(shape)
    scale = (torch.rand(grid, generator=generator) + 0.5).bfloat16().float()
    if number.scale == "e8m0":
        scale = torch.exp2(torch.randint(-20, 20, grid, generator=generator).float())
    elif number.scale == "e4m3":
        scale = (scale * 100).to(torch.float8_e4m3fn).float()
    if number.is_int:
        low, high = -(1 << number.bits - 1), 1 << number.bits - 1
        q = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
        zeros = torch.randint(low, high, grid, generator=generator).float()
    elif number.element == "fp4_e2m1":
        q = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    else:
        q = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    stored_inverse = torch.tensor(1234.567, dtype=torch.float32)
    return QuantWeight(
        format=number,
        q=q,
        scale=scale,
        zero_point=None if number.symmetric else zeros,
        global_scale=1 / stored_inverse.double() if number.scale == "e4m3" else None,
        bias=torch.rand(shape[0], generator=generator).bfloat16(),
    )
