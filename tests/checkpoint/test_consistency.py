"""A source whose config.json and weights contradict each other is refused, and no sound one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.consistency import refuse_contradictions
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.without_weights import open_headers
from quantkit.errors import InputError
from quantkit.pipeline.plan import make_plan
from tests.support.cli import quantkit, refused
from tests.support.families import CONFIGS, model
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors

Damage = Callable[[Path], None]
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"


def stating(**values: Any) -> Damage:
    return lambda path: edit_json(path / "config.json", lambda config: config.update(values))


def changing(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda path: edit_tensors(path, change)


def narrower(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"][:512]


def without_layer_1(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        del tensors[name]


DAMAGE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "fewer layers stated": (
        stating(num_hidden_layers=2), ("num_hidden_layers=2", "of 3 layers")),
    "more layers stated": (stating(num_hidden_layers=5), ("num_hidden_layers=5", "of 3 layers")),
    "a layer in between absent": (changing(without_layer_1), ("of 2 layers, none of layer 1",)),
    "hidden size": (stating(hidden_size=512, head_dim=64), ("hidden_size=512", "[49152, 576]")),
    "vocabulary": (stating(vocab_size=50000), ("vocab_size=50000", "[49152, 576]")),
    "heads": (
        stating(num_attention_heads=8, head_dim=64),
        ("num_attention_heads=8", "makes 512 rows", "q_proj.weight is [576, 576]", "2 more")),
    "key-value heads": (
        stating(num_key_value_heads=9), ("num_key_value_heads=9", "k_proj", "v_proj")),
    "width of heads": (stating(head_dim=32), ("head_dim=32", "o_proj")),
    "inner size": (stating(intermediate_size=1024), ("intermediate_size=1024", "down_proj")),
    "one projection": (changing(narrower), (f"{Q}.weight is [512, 576]",)),
    "no head": (stating(tie_word_embeddings=False), ("no lm_head.weight",)),
    "one layer absent": (
        changing(lambda t: t.pop(f"{DOWN}.weight")), ("layer 2 has no mlp.down_proj",)),
    "no hidden size": (stating(hidden_size=0), ("hidden_size=0",)),
    "negative heads": (stating(num_key_value_heads=-3), ("num_key_value_heads=-3",)),
    "empty tensor": (
        changing(lambda t: t.update({f"{DOWN}.weight": torch.zeros(0, 4)})),
        (f"{DOWN}.weight is empty: [0, 4]",)),
    "two at once": (
        stating(num_hidden_layers=5, vocab_size=50000), ("num_hidden_layers", "vocab_size")),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_contradiction_is_refused_with_its_values(
    name: str, small_model: Path, tmp_path: Path
) -> None:
    damage, telling = DAMAGE[name]
    path = copy_checkpoint(small_model, tmp_path / "model")
    damage(path)
    with pytest.raises(InputError) as caught:
        make_plan(open_checkpoint(path), load_recipe("rtn_fp8_dynamic"))
    assert caught.value.code == "plan.contradiction"
    for part in telling:
        assert part in caught.value.message


SOUND: dict[str, Damage] = {
    "padded embedding": stating(vocab_size=49000),
    "layers that predict further tokens": stating(num_hidden_layers=2, num_nextn_predict_layers=1),
    "no head dimension": stating(head_dim=None),
    "another family": stating(model_type="novel", num_hidden_layers=2),
    "a classifier": stating(
        tie_word_embeddings=False, architectures=["LlamaForSequenceClassification"]
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_no_contradiction_is_planned(name: str, small_model: Path, tmp_path: Path) -> None:
    path = copy_checkpoint(small_model, tmp_path / "model")
    SOUND[name](path)
    assert make_plan(open_checkpoint(path), load_recipe("rtn_fp8_dynamic")).layers


@pytest.mark.parametrize("family", CONFIGS)
def test_sound_families_have_no_contradiction(family: str, tmp_path: Path) -> None:
    path = model(family, tmp_path / "model")
    refuse_contradictions(open_checkpoint(path))
    for file in path.glob("*.safetensors"):
        file.unlink()
    if family not in ("gemma3", "qwen2_5_vl", "qwen3_vl"):
        refuse_contradictions(open_headers(path))


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"intermediate_size": [1, 2]}, "gate_proj.weight is empty: [0, 576] (as config.json"),
        ({"hidden_size": -576}, "hidden_size=-576"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"head_dim": -64}, "head_dim=-64"),
    ],
)
def test_a_config_alone_with_impossible_sizes(
    change: dict[str, Any], telling: str, small_model: Path, tmp_path: Path
) -> None:
    config = json.loads((small_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    refused(quantkit("plan", tmp_path, "--method", "rtn_fp8_dynamic"), 1, telling)


@pytest.mark.parametrize(
    ("settings", "telling"),
    [
        ({"weight_block_size": 128}, "weight_block_size=128"),
        ({"weight_block_size": [0, 128]}, "weight_block_size=[0, 128]"),
        ({"weight_block_size": [128, 128], "modules_to_not_convert": 5}, "not_convert=5"),
    ],
)
def test_a_malformed_quantization_config(
    settings: Any, telling: str, small_model: Path, tmp_path: Path
) -> None:
    config = json.loads((small_model / "config.json").read_text())
    stated = {**config, "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    refused(quantkit("plan", tmp_path, "--method", "rtn_fp8_dynamic"), 1, telling)
