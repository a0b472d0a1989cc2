"""`plan` and `quantize` refuse the same, with the same words: every method × kind of network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from quantkit.backends.registry import load_recipe
from quantkit.backends.registry.mixtures import mixtures
from quantkit.backends.registry.towers import towers
from quantkit.recipe.load import recipe_files
from tests.support.cli import inside, quantkit, refused
from tests.support.families import CONFIGS, NO_DIM, SMALL, model
from tests.support.helpers import edit_json
from tests.support.mixtures import MIXTURES, mixture

pytestmark = pytest.mark.broad

HYBRID: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: hf.Lfm2Config(**NO_DIM, layer_types=["conv", "full_attention"]),
    "qwen3_5_text": lambda: hf.Qwen3_5TextConfig(
        **SMALL, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=64, linear_value_head_dim=64,
    ),
}  # fmt: skip
DENSE = ("llama", "qwen2", "lfm2", "qwen3_5_text")
"""Untied, tied, and two hybrids of attention and something else."""
BEYOND = {
    "mixtral": "4 experts a layer",
    "deepseek_v3": "4 experts a layer",
    "qwen2_5_vl": "a vision or audio tower",
    "gemma3": "a vision or audio tower",
}
FAMILIES = (*DENSE, *BEYOND)
SAMPLE = ("gpt_oss", "granitemoe")
"""Mixtures that every run asks for; `make soak` asks for all."""
KEPT = ("--set", "on_misfit=keep16")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        if family in CONFIGS:
            model(family, root / family)
        else:
            torch.manual_seed(0)
            make: Any = hf.AutoModelForCausalLM.from_config
            make(HYBRID[family](), dtype=torch.bfloat16).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def both(path: Path, tmp_path: Path, *flags: str) -> tuple[int, str, str]:
    """How `plan` ends, and `quantize --dry-run` the same; `quantize` too where it is a refusal."""
    told = inside("plan", path, *flags)
    out = ("--out", tmp_path / "out")
    assert inside("quantize", path, *flags, *out, "--dry-run") == told
    if told[0]:
        assert inside("quantize", path, *flags, *out) == told
    assert not list(tmp_path.iterdir())
    return told


@pytest.mark.parametrize("method", sorted(recipe_files()))
def test_plan_ends_as_quantize_does(
    method: str, models: dict[str, Path], tmp_path: Path
) -> None:  # fmt: skip
    for family, path in models.items():
        code, error, message = both(path, tmp_path, "--method", method)
        backend = load_recipe(method).backend
        calibrates = not method.startswith("rtn_")
        if error == "plan.architecture":
            assert calibrates, (family, message)
            assert BEYOND.get(family, "layers that the library cannot take") in message
            assert code == 1
        elif calibrates and family in BEYOND:
            known = mixtures() if "experts" in BEYOND[family] else towers()
            allowed = backend in known
            others = ["plan.refused", "plan.group_size", *([""] if allowed else [])]
            assert error in others, (family, error)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in MIXTURES],
)
def test_every_method_ends_alike_on_every_mixture(family: str, tmp_path: Path) -> None:
    path, outs = mixture(family, tmp_path / "model"), tmp_path / "outs"
    outs.mkdir()
    ends = {m: both(path, outs, "--method", m, *KEPT)[1] for m in sorted(recipe_files())}
    assert ends["rtn_fp8_dynamic"] == ""
    assert set(ends.values()) <= {"", "plan.refused", "plan.architecture"}


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--set", "calibration.name=defualt"), "calibration.unknown_name"),
        (("--set", "calibration.name=mine.jsonl"), "calibration.missing"),
        (("--set", "kv_cache=nvfp4"), "plan.refused"),
        (("--set", "ignore+=*.q_proj"), "plan.split_group"),
        (("--set", "ignore+=model.layers.9.*"), "plan.unmatched_entry"),
        (("--set", "calibration=null"), "plan.refused"),
    ],
)
def test_a_wrong_setting_is_refused_by_both(
    flags: tuple[str, ...], error: str, models: dict[str, Path], tmp_path: Path
) -> None:
    code, found, _ = both(models["llama"], tmp_path, "--method", "llmcompressor_fp8", *flags)
    assert (code, found) == (1, error)


MIX = "samples: 1\nsources:\n  - {type: file, path: %s}\n"


@pytest.mark.parametrize("name", ["nothere.jsonl", "nothere.yaml", "mix.yaml"])
def test_calibration_data_that_is_not_there_ends_a_dry_run_as_the_run(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    data, outs = tmp_path / "data", tmp_path / "outs"
    for folder in (data, outs):
        folder.mkdir()
    (data / "mix.yaml").write_text(MIX % "nothere.jsonl")
    (data / "good.yaml").write_text(MIX % "here.txt")
    (data / "here.txt").write_text("words")
    asked = (models["llama"], "--method", "llmcompressor_fp8", "--out", outs / "out")
    flags = ("--calibration", data / name)
    code, error, message = inside("quantize", *asked, *flags, "--dry-run")
    assert (code, error) == (1, "calibration.missing")
    assert "nothere" in message
    assert inside("quantize", *asked, *flags) == (code, error, message)
    good = ("--calibration", data / "good.yaml")
    assert inside("quantize", *asked, *good, "--dry-run")[0] == 0
    assert list(outs.iterdir()) == []


def test_an_engine_that_refuses_is_told_in_the_same_words(
    models: dict[str, Path], tmp_path: Path
) -> None:
    sets = ("--set", "serve.engines=[vllm]", "--set", "serve.tp=[8]")
    flags = (models["llama"], "--method", "rtn_fp8_block", *sets)
    plan, dry = (
        quantkit("plan", *flags),
        quantkit("quantize", *flags, "--out", tmp_path / "out", "--dry-run"),
    )
    refused(plan, 1, "4 attention heads")
    assert plan.err == dry.err
    assert plan.code == dry.code
    assert "will not load it" in plan.out


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen2_5_vl", "msmodelslim_w8a16"),
        ("gemma3", "msmodelslim_w8a16"),
        ("mixtral", "autoround_nvfp4"),
    ],
)
def test_a_config_alone_is_refused_as_the_model_is(
    family: str, method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(models[family] / "config.json", bare / "config.json")
    code, error, message = inside("plan", bare, "--method", method)
    assert (code, error) == (1, "plan.architecture")
    assert "tower" in message or "experts" in message


def test_experts_are_told_by_their_names_too(models: dict[str, Path], tmp_path: Path) -> None:
    """A config that counts them under a key of its own."""
    bare = tmp_path / "bare"
    shutil.copytree(models["mixtral"], bare)
    edit_json(bare / "config.json", lambda c: c.update(expert_total=c.pop("num_local_experts")))
    assert "num_local_experts" not in json.loads((bare / "config.json").read_text())
    code, error, message = inside("plan", bare, "--method", "autoround_nvfp4")
    assert (code, error) == (1, "plan.architecture")
    assert "experts" in message
