"""The preflight on several families: what is kept, what is refused, from names and shapes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.pipeline.engine_view import check_engines
from quantkit.pipeline.plan import Plan, make_plan
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, set[str], int]] = {
    "qwen2 tied": (
        lambda: hf.Qwen2Config(**SMALL, tie_word_embeddings=True), {"model.embed_tokens"}, 14),
    "qwen3": (
        lambda: hf.Qwen3Config(**SMALL, head_dim=16), {"model.embed_tokens", "lm_head"}, 14),
    "gemma3": (
        lambda: hf.Gemma3TextConfig(**SMALL, head_dim=16), {"model.embed_tokens"}, 14),
    "phi3, fused already": (
        lambda: hf.Phi3Config(**SMALL, pad_token_id=0), {"model.embed_tokens", "lm_head"}, 8),
    "mixtral": (
        lambda: hf.MixtralConfig(**SMALL, num_local_experts=4),
        {"model.embed_tokens", "lm_head", "model.layers.0.block_sparse_moe.gate",
         "model.layers.1.block_sparse_moe.gate"}, 2 * (4 + 12)),
    "qwen3 moe": (
        lambda: hf.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32,
                                  num_experts_per_tok=2),
        {"model.embed_tokens", "lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"},
        2 * (4 + 12)),
}  # fmt: skip


def save(config: Any, target: Path) -> Path:
    torch.manual_seed(0)
    make: Any = hf.AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    return target


def plan_for(model: Path, method: str = "rtn_fp8_dynamic", *sets: str) -> Plan:
    return make_plan(open_checkpoint(model), load_recipe(method, sets))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_in_16_bit(family: str, tmp_path: Path) -> None:
    config, kept, count = FAMILIES[family]
    plan = plan_for(save(config(), tmp_path / "model"))
    assert set(plan.kept) == kept
    assert len(plan.layers) == count


def test_towers_and_mtp_layers_are_found_by_structure(small_model: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    edit_json(model / "config.json", lambda c: c.update(num_hidden_layers=2))
    added = ("visual.blocks.0.mlp.fc1.weight", "mtp.0.proj.weight")
    edit_tensors(model, lambda t: t.update({name: torch.zeros(8, 4) for name in added}))
    plan = plan_for(model)
    assert plan.kept["visual.blocks.0.mlp.fc1"].startswith("tower")
    assert plan.kept["mtp.0.proj"].startswith("mtp")
    assert plan.kept["model.layers.2.mlp.up_proj"].startswith("mtp")


def test_group_sizes_that_do_not_divide(small_model: Path) -> None:
    with pytest.raises(InputError, match=r"576.*would fit: 64, 32, 16"):
        plan_for(small_model, "rtn_w4a16")
    kept = plan_for(small_model, "rtn_w4a16", "on_misfit=keep16")
    assert {name.rpartition(".")[2] for name in kept.layers} == {"down_proj"}
    fitted = plan_for(small_model, "rtn_w4a16", "on_misfit=fit")
    sizes = {name.rpartition(".")[2]: s.weight.group_size for name, s in fitted.layers.items()}
    assert sizes["down_proj"] == 128
    assert sizes["q_proj"] == 64
    assert sum("group size" in note for note in fitted.notes) == 18


def test_experts_of_a_layer_are_alike_though_their_columns_differ(tmp_path: Path) -> None:
    config = hf.MixtralConfig(**SMALL | {"hidden_size": 96}, num_local_experts=4)
    model, half = save(config, tmp_path / "model"), "group_size=64"
    expert = "model.layers.1.block_sparse_moe.experts.3."
    fitted = plan_for(model, "rtn_w4a16", half, "on_misfit=fit")
    sizes = {s.weight.group_size for name, s in fitted.layers.items() if ".experts." in name}
    assert sizes == {32}
    assert f"{expert}w2: group size 32 instead of 64" in fitted.notes
    kept = plan_for(
        model, "rtn_w4a16", half, "on_misfit=keep16",
        "overrides=[{match: '*.self_attn.*', scheme: w8a16, group_size: 32}]",
    )  # fmt: skip
    assert not [name for name in kept.layers if ".experts." in name]
    assert "does not divide 96" in kept.kept[f"{expert}w2"]


def test_overrides_and_targets(small_model: Path) -> None:
    plan = plan_for(
        small_model, "rtn_fp8_dynamic", "overrides=[{match: '*.down_proj', scheme: w8a16}]",
        "targets=['@mlp']",
    )  # fmt: skip
    names = {name.rpartition(".")[2]: scheme.name for name, scheme in plan.layers.items()}
    assert names == {"gate_proj": "fp8_dynamic", "up_proj": "fp8_dynamic", "down_proj": "w8a16"}


@pytest.mark.parametrize(
    "change",
    [
        "ignore+=*.q_proj",
        "overrides=[{match: '*.up_proj', scheme: w8a16}]",
        "targets=['*.k_proj', '*.down_proj']",
    ],
)
def test_layers_that_engines_merge_have_one_scheme(small_model: Path, change: str) -> None:
    with pytest.raises(InputError, match="merge into one"):
        plan_for(small_model, "rtn_fp8_dynamic", change)


def test_an_engine_that_refuses_the_shapes_does_not_load_it(small_model: Path) -> None:
    plan = check_engines(open_checkpoint(small_model), plan_for(small_model, "rtn_fp8_block"))
    assert plan.loads.refusing == ("vllm", "sglang")  # 576 and 192 rows, merged in blocks of 128
    assert plan.loads.describe() == "Transformers"
    assert any("vLLM will not load it" in note for note in plan.notes)


def test_the_estimate_is_the_size_that_is_written(small_model: Path) -> None:
    plan = plan_for(small_model, "rtn_w4a16", "group_size=64")
    quantized = sum(576 * 576 * 2 + 192 * 576 * 2 + 1536 * 576 * 3 for _ in range(3))
    kept = (49152 * 576 + 7 * 576) * 2
    assert plan.estimate.output == kept + quantized * (4 + 16 / 64) / 8
    assert plan.bits_per_weight == 4.25


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"model_type": "gpt2"}, "Conv1D"),
        ({"quantization_config": {"quant_method": "awq"}}, "stale quantization settings"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "nova"}, "trust-remote-code"),
    ],
)
def test_refusals_by_config(
    small_model: Path, tmp_path: Path, change: dict[str, Any], telling: str
) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    edit_json(model / "config.json", lambda c: c.update(change))
    with pytest.raises(InputError, match=telling):
        plan_for(model)


def test_a_silent_quantized_checkpoint_is_refused(small_model: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    scales = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1536, 1)}
    edit_tensors(model, lambda tensors: tensors.update(scales))
    with pytest.raises(InputError, match="quantized already"):
        plan_for(model)


def test_native_architectures_need_no_remote_code(small_model: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    edit_json(model / "config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "x.Y"}))
    assert plan_for(model).layers
    assert "auto_map" in json.loads((model / "config.json").read_text())


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("rtn_w4a16", "--set 'ignore+=*.down_proj'"),
        ("rtn_nvfp4a16", "--set 'ignore+=*.down_proj'"),
    ],
)
def test_the_hint_names_a_group_size_only_where_one_fits(
    method: str, hint: str, tmp_path: Path
) -> None:
    config = hf.LlamaConfig(**{**SMALL, "intermediate_size": 200})
    model = save(config, tmp_path / "model")
    size = ("group_size=64",) if method == "rtn_w4a16" else ()
    with pytest.raises(InputError, match="would fit: none") as caught:
        plan_for(model, method, *size)
    assert hint in caught.value.hint
    assert "group_size" not in caught.value.hint
    plan = plan_for(model, method, *size, "ignore+=*.down_proj")
    assert "model.layers.0.mlp.down_proj" in plan.kept


def test_the_hint_names_the_largest_group_size_that_fits(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**{**SMALL, "intermediate_size": 96})
    model = save(config, tmp_path / "model")
    with pytest.raises(InputError) as caught:
        plan_for(model, "rtn_w4a16", "group_size=64")
    assert "--set group_size=32" in caught.value.hint
    assert plan_for(model, "rtn_w4a16", "group_size=32").layers
