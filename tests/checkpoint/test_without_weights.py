"""Plans for models whose weights are absent, or on the hub: what is derived is what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.network.config import text_size
from quantkit.checkpoint.without_weights import open_headers
from quantkit.errors import InputError
from tests.support.cli import Run, quantkit, refused
from tests.support.families import CONFIGS, model
from tests.support.helpers import edit_json
from tests.support.hubserver import serve

pytestmark = pytest.mark.broad

TEXT = [name for name in CONFIGS if name not in ("gemma3", "qwen2_5_vl", "qwen3_vl")]


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in open_headers(path).tensors.items()}


def index_only(source: Path, target: Path) -> Path:
    """Config and index of a model, without its shard."""
    target.mkdir()
    names = open_checkpoint(source).tensors
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def config_only(source: Path, target: Path) -> Path:
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


@pytest.mark.parametrize("family", TEXT)
def test_names_and_shapes_are_derived_from_a_config(family: str, tmp_path: Path) -> None:
    real = model(family, tmp_path / "model")
    bare = config_only(real, tmp_path / "bare")
    derived = open_headers(bare)
    assert derived.derived == "config.json"
    linear = {name: shape for name, shape in shapes(real).items() if len(shape) > 1}
    assert {n: s for n, s in shapes(bare).items() if len(s) > 1} == linear
    assert shapes(bare).keys() - linear.keys() <= shapes(real).keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_shapes_are_derived_for_the_names_of_an_index(family: str, tmp_path: Path) -> None:
    real = model(family, tmp_path / "model")
    derived = open_headers(index_only(real, tmp_path / "index"))
    assert derived.derived == "the index and config.json"
    tower = ("visual", "vision", "multi_modal")
    for name, shape in shapes(real).items():
        if not any(part in name for part in tower):
            assert derived.tensors[name].shape == shape, name
    assert {m.name: m.kind for m in derived.modules if len(m.shape) > 1}.items() >= {
        m.name: m.kind for m in open_checkpoint(real).modules if len(m.shape) == 2
    }.items()


def test_shards_that_are_there_are_read(tmp_path: Path) -> None:
    real = model("llama", tmp_path / "model")
    half = index_only(real, tmp_path / "half")
    index = half / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    import torch
    from safetensors.torch import save_file

    there = {"model.norm.weight": torch.ones(77)}
    save_file(there, half / "model-00002-of-00002.safetensors")
    found = open_headers(half)
    assert found.derived == "the index and present shards"
    assert found.tensors["model.norm.weight"].shape == (77,)


def test_absent_shards_stop_quantize_and_not_plan(tmp_path: Path) -> None:
    bare = index_only(model("llama", tmp_path / "model"), tmp_path / "index")
    flags = ("--method", "rtn_fp8_dynamic")
    planned = quantkit("plan", bare, *flags, "--json")
    assert planned.code == 0, planned.err
    assert planned.document["derived"] == "the index and config.json"
    refused(quantkit("quantize", bare, *flags, "--out", tmp_path / "out"), 1, "absent")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "telling"),
    [({"model_type": "no_such"}, "no_such"), ({"model_type": "llama"}, "hidden_size")],
)
def test_what_cannot_be_derived_is_refused(
    config: dict[str, Any], telling: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=telling) as raised:
        open_headers(tmp_path)
    assert raised.value.code == "plan.underivable"


def test_experts_in_alternating_rows_are_planned_without_weights(tmp_path: Path) -> None:
    """GPT-OSS's: a plan of the config alone has the layers of that with weights."""
    real = model("gpt_oss", tmp_path / "model")
    bare = config_only(real, tmp_path / "bare")
    layers = planned(bare).document["layers"]
    assert layers == planned(real).document["layers"]
    assert any(".experts." in name for name in layers)


def test_what_is_not_derived_is_told(tmp_path: Path) -> None:
    """The ignore list of a config alone lacks the tower; that of an index has it."""
    real = model("qwen3_vl", tmp_path / "model")
    bare = planned(config_only(real, tmp_path / "bare")).document
    assert bare["incomplete"] == ["vision tower"]
    assert not any("visual" in name for name in bare["ignore"])
    index = planned(index_only(real, tmp_path / "index")).document
    assert index["incomplete"] == []
    assert any("visual" in name for name in index["ignore"])
    shown = quantkit("plan", tmp_path / "bare", "--method", "rtn_fp8_dynamic")
    assert "vision tower" in shown.out


def test_draft_layers_are_told_to_be_left_out(tmp_path: Path) -> None:
    bare = config_only(model("deepseek_v3", tmp_path / "model"), tmp_path / "bare")
    assert planned(bare).document["incomplete"] == []
    edit_json(bare / "config.json", lambda config: config.update(num_nextn_predict_layers=1))
    assert planned(bare).document["incomplete"] == ["MTP layers"]


SPARSE = ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


def test_sizes_left_to_the_config_class_are_known(tmp_path: Path) -> None:
    """Gemma 3 4B's config.json does not state its heads and vocabulary."""
    import transformers as hf

    bare = config_only(model("gemma3", tmp_path / "model"), tmp_path / "bare")
    edit_json(bare / "config.json", lambda c: [c["text_config"].pop(key) for key in SPARSE])
    config = json.loads((bare / "config.json").read_text())
    defaults = hf.Gemma3TextConfig()
    assert [text_size(config, key) for key in SPARSE] == [getattr(defaults, k) for k in SPARSE]
    query = open_headers(bare).tensors["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert query.shape == (8 * 256, 256)
    flags = ("--method", "rtn_fp8_dynamic", "--engine", "vllm", "--json", "--tp")
    assert quantkit("plan", bare, *flags, "8").code == 0
    run = quantkit("plan", bare, *flags, "3")
    assert "8 attention heads" in run.document["verdicts"][0]["reasons"][0]["message"]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "glm4", "gpt_oss", "qwen3"])
def test_defaults_are_those_of_transformers(family: str) -> None:
    import transformers as hf

    defaults = hf.AutoConfig.for_model(family)
    assert text_size({"model_type": family}, "head_dim") == defaults.head_dim


def test_a_flat_config_of_qwen2_5_vl_is_its_language_model(tmp_path: Path) -> None:
    bare = config_only(model("qwen2_5_vl", tmp_path / "model"), tmp_path / "bare")
    nested = shapes(bare)

    def flatten(config: dict[str, Any]) -> None:
        config |= {**config.pop("text_config"), "model_type": "qwen2_5_vl"}

    edit_json(bare / "config.json", flatten)
    assert shapes(bare) == {
        name.replace("model.language_model.", "model."): shape for name, shape in nested.items()
    }
    assert "model.layers.0.self_attn.q_proj.bias" in shapes(bare)


def test_a_source_in_fp8_blocks_is_derived_as_such(tmp_path: Path) -> None:
    real = config_only(model("deepseek_v3", tmp_path / "model"), tmp_path / "bf16")
    blocks = config_only(real, tmp_path / "fp8")
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(blocks / "config.json", lambda c: c.update(quantization_config=settings))
    found = open_headers(blocks).tensors
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert (found[name].dtype, found[name].shape) == ("F8_E4M3", (512, 96))
    scale = found[f"{name}_scale_inv"]
    assert (scale.dtype, scale.shape) == ("F32", (4, 1))
    assert found["model.layers.1.mlp.gate.weight"].dtype == "BF16"
    flags = ("--method", "rtn_fp8_dynamic", "--json")
    sizes = [quantkit("plan", at, *flags).document["estimate"]["source"] for at in (blocks, real)]
    assert sizes[0] < 0.6 * sizes[1]
    index = tmp_path / "index"
    shutil.copytree(blocks, index)
    weight_map = dict.fromkeys(found, "model-00001-of-00001.safetensors")
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    indexed = open_headers(index).tensors
    assert {n: (i.dtype, i.shape) for n, i in indexed.items()} == {
        n: (i.dtype, i.shape) for n, i in found.items()
    }


def planned(where: Path | str, *flags: str) -> Run:
    return quantkit("plan", where, "--method", "rtn_fp8_block", "--json", *flags)


def test_a_refusing_engine_is_exit_1_with_the_whole_document(tmp_path: Path) -> None:
    bare = index_only(model("qwen3_moe", tmp_path / "model"), tmp_path / "index")
    run = planned(bare, "--engine", "vllm,sglang", "--tp", "1,2,4", "--gpu", "h100")
    assert run.code == 1
    found = {(v["engine"], v["tp"]): v["loads"] for v in run.document["verdicts"]}
    assert found == {(e, tp): tp < 4 for e in ("vllm", "sglang") for tp in (1, 2, 4)}
    refusal = next(v for v in run.document["verdicts"] if not v["loads"])
    assert all({"code", "message", "fix", "where"} <= set(r) for r in refusal["reasons"])
    assert "model.layers.0.mlp.gate" in run.document["ignore"]
    assert planned(bare, "--engine", "vllm", "--tp", "2").code == 0
    assert planned(bare).code == 0


def test_quantize_refuses_what_the_recipe_must_be_served_with(tmp_path: Path) -> None:
    source = model("llama", tmp_path / "model")
    flags = ("--method", "rtn_fp8_block", "--set", "serve.engines=[vllm]", "--set", "serve.tp=[8]")
    run = quantkit("quantize", source, *flags, "--out", tmp_path / "out")
    refused(run, 1, "vLLM", "tensor-parallel size 8", "4 attention heads")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [("--engine", "triton"), ("--gpu", "voodoo2"), ("--tp", "two")])
def test_unknown_engines_and_devices_are_named(flags: tuple[str, str], tmp_path: Path) -> None:
    bare = index_only(model("llama", tmp_path / "model"), tmp_path / "index")
    more = ("--engine", "vllm") if flags[0] != "--engine" else ()
    run = quantkit("plan", bare, "--method", "rtn_fp8_dynamic", *more, *flags)
    refused(run, 1, flags[1])


@pytest.mark.parametrize(
    ("flags", "told", "hint"),
    [
        (("--tp", "0"), "--tp 0", "--tp 1,2,4,8"),
        (("--tp", "1,,2"), "--tp 1,,2", "--tp 1,2,4,8"),
        (("--engine", "foo"), "--engine foo", "vllm"),
        (("--gpu", "voodoo2"), "--gpu voodoo2", "h100"),
    ],
)
def test_a_wrong_value_is_an_error_of_its_flag(
    flags: tuple[str, str], told: str, hint: str, tmp_path: Path
) -> None:
    run = quantkit("plan", tmp_path, "--method", "rtn_fp8_dynamic", *flags)
    refused(run, 1, told, hint)
    assert "rtn_fp8_dynamic" not in run.err


def test_sizes_without_an_engine_are_held_against_all_of_them(tmp_path: Path) -> None:
    """Four heads of 128: sizes up to 4 are shared out, and 3 by no engine."""
    bare = config_only(model("llama", tmp_path / "model"), tmp_path / "bare")
    flags = ("--method", "rtn_fp8_dynamic", "--json")
    assert quantkit("plan", bare, *flags, "--tp", "2").code == 0
    run = quantkit("plan", bare, *flags, "--tp", "2,3")
    assert run.code == 1
    assert not any(v["loads"] for v in run.document["verdicts"] if v["tp"] == 3)
    int4 = ("--method", "rtn_w8a8_dynamic", "--json")
    assert quantkit("plan", bare, *int4, "--gpu", "h100").code == 0
    mx = ("--method", "rtn_mxfp4a16", "--json")
    assert quantkit("plan", bare, *mx, "--gpu", "ascend-a2").code == 1


def test_a_model_on_the_hub_is_planned_from_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model("llama", tmp_path / "model")
    files = {path.name: path.read_bytes() for path in real.iterdir()}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve({"models/org/tiny": files}) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        run = planned("org/tiny", "--engine", "vllm")
    assert run.code == 0, run.err
    assert run.document["derived"] == "the hub's headers"
    assert len(run.document["layers"]) == 14
    kept = sum(path.stat().st_size for path in (tmp_path / "hf").rglob("*") if path.is_file())
    assert kept < len(files["model.safetensors"]) / 10
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_time_is_estimated_from_real_layers(tmp_path: Path) -> None:
    real = model("llama12", tmp_path / "model")
    run = quantkit("plan", real, "--method", "rtn_fp8_dynamic", "--measure", "--json")
    assert run.code == 0, run.err
    seconds = run.document["estimate"]["seconds"]
    assert seconds["total"] == pytest.approx(seconds["once"] + 12 * seconds["per_layer"], abs=0.2)
    assert seconds["total"] > 0
    bare = index_only(real, tmp_path / "index")
    refused(
        quantkit("plan", bare, "--method", "rtn_fp8_dynamic", "--measure"),
        1,
        "no weights can be read",
    )
