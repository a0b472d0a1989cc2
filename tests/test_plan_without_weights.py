"""Plans for models whose weights are absent, or on the hub: what is derived is what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint import open_checkpoint
from quantkit.derive import open_headers
from quantkit.errors import InputError
from tests.cli import Run, quantkit, refused
from tests.families import CONFIGS, model
from tests.hubserver import serve

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


def test_a_plan_refuses_what_the_streaming_writer_will(tmp_path: Path) -> None:
    """GPT-OSS's experts hold gate and up in alternating rows; the bias beside them tells."""
    bare = config_only(model("gpt_oss", tmp_path / "model"), tmp_path / "bare")
    flags = ("--method", "rtn_fp8_dynamic")
    run = quantkit("plan", bare, *flags)
    refused(run, 1, "experts.gate_up_proj", "bias", "ignore+=re:.*mlp.experts.*")
    kept = quantkit("plan", bare, *flags, "--set", "ignore+=re:.*mlp.experts.*", "--json")
    assert kept.code == 0, kept.err
    assert set(kept.document["layers"].values()) == {"fp8_dynamic"}


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
    refused(quantkit("plan", bare, "--method", "rtn_fp8_dynamic", "--measure"), 1, "not here")
