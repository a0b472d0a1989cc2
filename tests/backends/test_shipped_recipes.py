"""The recipes that ModelOpt ships, as methods: which layers they name, and what is refused."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from quantkit.backends.registry import load_recipe
from quantkit.backends.registry.shipped import (
    PREFIX,
    _resolved,
    _root,
    shipped_names,
    shipped_recipe,
    why_not,
)
from quantkit.errors import InputError
from tests.support.cli import inside, quantkit, said

pytest.importorskip("modelopt_recipes", reason="ModelOpt is optional: quantkit[modelopt]")

GENERAL = f"{PREFIX}general/ptq/"
LAYERS = [
    f"model.layers.3.{leaf}"
    for leaf in (
        "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.gate",
        "mlp.experts.7.up_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate",
        "block_sparse_moe.gate", "block_sparse_moe.experts.1.w2", "linear_attn.in_proj_a",
        "mixer.up_proj", "mixer.conv1d", "moe.gate", "moe.up_proj", "share_expert.up_proj",
    )
] + ["lm_head", "model.vision_tower.blocks.0.mlp.fc1", "mtp.layers.0.mlp.up_proj"]  # fmt: skip


def usable() -> list[str]:
    return [name for name in shipped_names() if not why_not(name)]


def weights_on(name: str, layer: str) -> bool:
    """What ModelOpt makes of the recipe: of the entries that name a quantizer the last decides."""
    config = _resolved(_root() / f"{name.removeprefix(PREFIX)}.yaml")["quantize"]["quant_cfg"]
    on = False
    for entry in config:
        named = fnmatchcase(f"{layer}.weight_quantizer", entry["quantizer_name"])
        if named and not entry.get("parent_class"):
            on = entry.get("enable", True)
    return on


@pytest.mark.parametrize("name", usable())
def test_a_recipe_names_the_layers_that_modelopt_quantizes_by_it(name: str) -> None:
    (target,) = shipped_recipe(name)["targets"]
    taken = [layer for layer in LAYERS if re.match(target.removeprefix("re:"), layer)]
    assert taken == [layer for layer in LAYERS if weights_on(name, layer)]
    assert taken


@pytest.mark.parametrize(
    ("name", "scheme", "kv"),
    [
        ("fp8_default-kv_fp8", "fp8", "fp8"),
        ("nvfp4_default-kv_fp8", "nvfp4", "fp8"),
        ("nvfp4_weight_only-kv_fp16", "nvfp4a16", "none"),
        ("nvfp4_experts_only-kv_fp8_layerwise", "nvfp4", "fp8"),
    ],
)
def test_formats_and_cache_are_the_recipes(name: str, scheme: str, kv: str) -> None:
    recipe = load_recipe(GENERAL + name, ("seed=3",))
    assert (recipe.scheme, recipe.kv_cache, recipe.seed) == (scheme, kv, 3)
    assert (recipe.placement == "layerwise") == ("layerwise" in name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("general/ptq/fp8_default-kv_fp8_cast", "KV cache"),
        ("general/ptq/int4_blockwise_weight_only", "no engine loads"),
        ("general/ptq/nvfp4_mlp_weight_only", "number format"),
        ("general/ptq/nvfp4_default-kv_none-gptq", "gptq"),
        ("huggingface/qwen3_5_moe/ptq/nvfp4_experts_mse-fp8_rest-kv_fp8", "mixes"),
        ("huggingface/vit/ptq/fp8", "bmm_quantizer"),
        ("models/deepseek-ai/DeepSeek-V4-Pro-0813/ptq/nvfp4_experts_only", "fused experts"),
    ],
)
def test_what_is_no_method_here_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        load_recipe(PREFIX + name)
    assert caught.value.code == "recipe.unusable"


def test_the_list_has_all_and_says_which_are_methods() -> None:
    run = quantkit("recipes", "list", "--from", "modelopt", "--json")
    found = {one["name"]: one for one in run.document["recipes"]}
    assert found.keys() == set(shipped_names())
    assert {name for name, one in found.items() if one["usable"]} == set(usable())
    assert all(one["why_not"] for one in found.values() if not one["usable"])
    assert inside("recipes", "list", "--from", "elsewhere")[1] == "recipe.no_library"
    assert inside("recipes", "show", f"{GENERAL}fp8_defualt-kv_fp8")[1] == "recipe.unknown_method"


@pytest.mark.slow
@pytest.mark.library
@pytest.mark.filterwarnings("ignore")
def test_imports_are_resolved_as_modelopt_does() -> None:
    from modelopt.recipe import load_recipe as load

    def named(entries: list[Any]) -> list[tuple[str, bool]]:
        plain = [one if isinstance(one, dict) else one.model_dump() for one in entries]
        return [(one["quantizer_name"], one.get("cfg") is None) for one in plain]

    for name in shipped_names():
        path = name.removeprefix(PREFIX)
        own = _resolved(_root() / f"{path}.yaml")["quantize"]["quant_cfg"]
        assert named(own) == named(load(path).quantize.quant_cfg), name


@pytest.mark.slow
@pytest.mark.library
def test_a_checkpoint_is_made_by_one(small_model: Path, tmp_path: Path) -> None:
    code, told = said(
        "quantize", small_model, "--method", f"{GENERAL}fp8_default-kv_fp8", "--out",
        tmp_path / "out", "--set", "calibration.samples=4",
        "--set", "calibration.sequence_length=64",
    )  # fmt: skip
    assert code == 0, told
    made = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert (made["quant_algo"], made["kv_cache_quant_algo"]) == ("FP8", "FP8")
