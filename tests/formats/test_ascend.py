"""msModelSlim's layout, written by hand from seeded weights as version 26.1 writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.formats import ascend
from quantkit.formats.dequantize import dequantize
from quantkit.formats.registry import detect, is_quantized
from tests.support.helpers import edit_json

ROWS, COLUMNS = 64, 96
LAYERS = {
    "model.layers.0.self_attn.q_proj": "W8A8",
    "model.layers.0.self_attn.k_proj": "W8A8_MIX",
    "model.layers.0.self_attn.v_proj": "W8A16",
    "model.layers.0.self_attn.o_proj": "W8A8_DYNAMIC",
    "model.layers.0.mlp.gate_proj": "W4A8_DYNAMIC",
    "model.layers.0.mlp.up_proj": "W4A4_DYNAMIC",
    "model.layers.0.mlp.down_proj": "WFP8AFP8_DYNAMIC",
    "model.layers.0.mlp.gate": "FLOAT",
}
STEP = {"W4A8_DYNAMIC": 7, "W4A4_DYNAMIC": 7}


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The directory, and the 16-bit weights it was made from."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    types: dict[str, str] = {}
    weights = {}
    for name, kind in LAYERS.items():
        weight = torch.randn(ROWS, COLUMNS, generator=generator)
        weights[name] = weight
        parts = layer(weight, kind)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
        types |= {f"{name}.{suffix}": kind for suffix in parts}
    tensors["model.layers.0.self_attn.k_proj.kv_cache_scale"] = torch.ones(ROWS)
    types["model.layers.0.self_attn.k_proj.kv_cache_scale"] = "C8"
    shard = "quant_model_weights-00001-of-00001.safetensors"
    save_file(tensors, tmp_path / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (tmp_path / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    description = {
        **types, "version": "1.0.0", "model_quant_type": "W8A8", "metadata": {}, "group_size": 0,
        "kv_cache_type": "C8", "optional": {},
    }  # fmt: skip
    (tmp_path / "quant_model_description.json").write_text(json.dumps(description))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": COLUMNS}))
    return tmp_path, weights


def layer(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by `on_w8a8_static` and its siblings in msModelSlim's saver."""
    if kind == "FLOAT":
        return {"weight": weight.bfloat16()}
    top = STEP.get(kind, 448 if "FP8" in kind else 127)
    scale = weight.abs().amax(1) / top
    parts: dict[str, torch.Tensor] = {}
    if "FP8" in kind:
        codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    else:
        codes = (weight / scale[:, None]).round().to(torch.int8)
    if kind != "W8A8":
        parts |= {"weight_scale": scale[:, None], "weight_offset": torch.zeros(ROWS, 1)}
    if kind in ("W8A8", "W8A8_MIX"):
        input_scale, input_offset = torch.tensor([0.02]), torch.tensor([52.0])
        deq_scale = input_scale * scale
        bits = deq_scale.view(torch.int32).long()
        parts |= {
            "input_scale": input_scale,
            "input_offset": input_offset,
            "deq_scale": bits if kind == "W8A8_MIX" else deq_scale,
            "quant_bias": -(codes.float().sum(1) * input_offset).round().int(),
        }
    if kind == "W4A8_DYNAMIC":
        parts["scale_bias"] = torch.zeros(ROWS, 1)
        codes = (codes[0::2] & 15) | (codes[1::2] << 4)
    return {"weight": codes.contiguous(), **parts}


def test_reads_every_type(checkpoint_dir: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, weights = checkpoint_dir
    checkpoint = open_checkpoint(path)
    layout = detect(checkpoint)
    assert layout.NAME == "ascend"
    assert is_quantized(checkpoint) == "ascend"
    declaration = layout.declare(checkpoint)
    assert {n: s.packing for n, s in declaration.layers.items()} == {
        n: k for n, k in LAYERS.items() if k != "FLOAT"
    }
    assert declaration.ignored == {"model.layers.0.mlp.gate": "FLOAT"}
    assert declaration.kv_cache == "int8"
    assert not declaration.problems
    for name, spec in declaration.layers.items():
        found = {}
        for suffix, tensor in layout.expected(spec).items():
            info = checkpoint.tensors.get(f"{name}.{suffix}")
            assert info is not None or not tensor.required, (name, suffix)
            if info is not None:
                assert info.dtype in tensor.dtypes, (name, suffix)
                assert info.shape in tensor.shapes, (name, suffix)
                found[suffix] = checkpoint.tensor(info.name)
        weight = layout.read(found, spec)
        off = (dequantize(weight) - weights[name]).abs()
        step = weights[name].abs().amax(1, keepdim=True) / STEP.get(spec.packing, 127)
        limit = weights[name].abs() / 16 if "FP8" in spec.packing else step * 0.501
        assert off.le(limit + 1e-3).all(), spec.packing
        static = spec.packing in ("W8A8", "W8A8_MIX")
        assert (weight.input_zero_point is not None) == static


def test_description_that_does_not_fit(
    checkpoint_dir: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = checkpoint_dir
    description = path / "quant_model_description.json"
    edit_json(description, lambda d: d.update({"model.layers.7.mlp.up_proj.weight": "W8A8"}))
    edit_json(description, lambda d: d.update({"model.layers.0.mlp.up_proj.weight_scale": "FLOAT"}))
    edit_json(description, lambda d: d.pop("model.layers.0.self_attn.q_proj.weight"))
    declaration = ascend.declare(open_checkpoint(path))
    assert [p.code for p in declaration.problems] == [
        "format.tensor_missing", "format.contradiction"
    ]  # fmt: skip
    assert declaration.undeclared == ("model.layers.0.self_attn.q_proj",)
    edit_json(description, lambda d: d.update({"model.layers.0.mlp.up_proj.weight": "W1A1"}))
    with pytest.raises(InputError, match="W1A1"):
        ascend.declare(open_checkpoint(path))
