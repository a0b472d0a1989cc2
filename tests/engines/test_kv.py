"""KV caches that an engine or a GPU does not take as they are; caveats in every output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.engines import Loadable, engines, gpu_named, judge
from tests.formats.test_foreign import made
from tests.runtime.test_launch import modelopt
from tests.support.cli import quantkit
from tests.support.helpers import edit_json

pytestmark = pytest.mark.broad

ATTENTION = "model.layers.0.self_attn"


def candidate(family: str, *scales: str, layout: str = "modelopt", kv_cache: str = "fp8"
              ) -> Loadable:  # fmt: skip
    settings = {"quant_method": layout, "quant_algo": "FP8"}
    return Loadable({"model_type": family}, layout, settings, {}, kv_cache, scales)


def cautions(engine: str, this: Loadable) -> list[str]:
    return [caution.code for caution in judge(this, [engine], [1])[0].cautions]


PROJECTIONS = (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale")


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "mixtral"])
def test_families_whose_scales_sglang_drops(family: str) -> None:
    assert cautions("sglang", candidate(family, *PROJECTIONS)) == ["engine.kv_scales"]
    assert cautions("vllm", candidate(family, *PROJECTIONS)) == []
    assert cautions("sglang", candidate(family)) == []


def test_qwen3_5_needs_a_newer_vllm() -> None:
    assert cautions("vllm", candidate("qwen3_5", *PROJECTIONS)) == ["engine.kv_scales"]
    assert cautions("sglang", candidate("qwen3_5", *PROJECTIONS)) == []


@pytest.mark.parametrize(
    ("name", "vllm", "sglang"),
    [
        (f"{ATTENTION}.k_proj.k_scale", True, True),
        (f"{ATTENTION}.v_scale", True, True),
        (f"{ATTENTION}.kv_scale", True, True),
        (f"{ATTENTION}.attn.k_scale", True, False),
        (f"{ATTENTION}.qkv_proj.k_scale", True, False),
        (f"{ATTENTION}.k_proj.output_scale", False, True),
        (f"{ATTENTION}.kv_cache_scale", False, False),
        (f"{ATTENTION}.cache.k_scale", False, False),
    ],
)
def test_names_of_scales(name: str, vllm: bool, sglang: bool) -> None:
    for engine, taken in (("vllm", vllm), ("sglang", sglang)):
        assert (cautions(engine, candidate("llama", name)) == []) == taken
    if name.endswith("output_scale"):
        assert cautions("vllm", candidate("llama", name, layout="quark")) == []


@pytest.mark.parametrize(
    ("engine", "gpu", "loads"),
    [
        ("vllm", "b200", True), ("vllm", "h100", False), ("vllm", "a100", False),
        ("vllm", "rtx5090", False), ("vllm", "mi300x", False), ("sglang", "h100", True),
        ("sglang", "rtx5090", True), ("sglang", "a100", False),
    ],
)  # fmt: skip
def test_gpus_with_kernels_for_an_nvfp4_cache(engine: str, gpu: str, loads: bool) -> None:
    for kind in ("nvfp4", "fp8"):
        verdict = judge(candidate("llama", kv_cache=kind), [engine], [1], gpu_named(gpu))[0]
        refusing = [r for r in verdict.reasons if r.code == "engine.kv_cache"]
        assert (not refusing) == (loads or kind == "fp8")
    assert cautions(engine, candidate("llama", kv_cache="nvfp4")) == ["engine.kv_cache"]


def test_every_dropped_family_is_one_that_the_engine_has() -> None:
    for engine in engines().values():
        known = {kind for family in engine.families for kind in family.types}
        listed = {*engine.kv_cache.dropped, *sum(engine.kv_cache.dropped_before.values(), ())}
        assert listed <= known


def with_cache(path: Path, family: str) -> Path:
    """A checkpoint of `test_launch.modelopt` with scales of its cache."""
    modelopt(path, "FP8", kv_cache=True)
    tensors = load_file(path / "model.safetensors")
    scales = {name: torch.tensor(0.03 + i / 100) for i, name in enumerate(PROJECTIONS)}
    save_file({**tensors, **scales}, path / "model.safetensors", metadata={"format": "pt"})
    edit_json(path / "config.json", lambda config: config.update(model_type=family))
    return path


def test_verify_and_launch_say_that_scales_are_dropped(tmp_path: Path) -> None:
    for family, told in (("qwen2", True), ("llama", False)):
        path = with_cache(tmp_path / family, family)
        document = json.loads(quantkit("verify", path, "--json").out)
        codes = [f["code"] for f in document["findings"]]
        assert ("engine.kv_scales" in codes) == told
        launched = quantkit("launch", path, "--engine", "sglang")
        assert launched.code == 0
        assert ("serves the cache at scale 1" in launched.err) == told


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_launch_trusts_code_that_the_checkpoint_brings(tmp_path: Path, engine: str) -> None:
    path = made(tmp_path / "m", "dynamic")
    flag, asked = "--trust-remote-code", ("launch", path, "--engine", engine)
    assert flag not in quantkit(*asked).out
    code = {"AutoConfig": "configuration_novel.NovelConfig"}
    edit_json(path / "config.json", lambda config: config.update(auto_map=code))
    run = quantkit(*asked)
    assert flag in run.out.split()
    assert "configuration_novel.py" in run.err
    edit_json(path / "config.json", lambda config: config.pop("auto_map"))
    mapped: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["tokenization_novel.Novel", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(mapped))
    assert flag in quantkit(*asked).out.split()


def test_awq_on_ascend_is_not_for_vllm(tmp_path: Path) -> None:
    this = Loadable({"model_type": "llama"}, "awq", {"quant_method": "awq"}, {})
    npu = gpu_named("ascend-a2")
    assert [r.code for r in judge(this, ["vllm"], [1], npu)[0].reasons] == ["engine.gpu"]
    assert judge(this, ["sglang"], [1], npu)[0].loads
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                    "num_hidden_layers": 2}))  # fmt: skip
    asked = ("plan", tmp_path, "--method", "modelopt_fp8", "--set", "kv_cache=nvfp4",
             "--engine", "vllm", "--gpu")  # fmt: skip
    assert quantkit(*asked, "b200").code == 0
    refusing = quantkit(*asked, "h100")
    assert refusing.code == 1
    assert "NVFP4 KV cache" in refusing.out
