"""Experts and routers are found by structure, in every family of the installed Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.network.config import expert_count, experts_per_token
from quantkit.checkpoint.network.expert_layout import input_first
from quantkit.checkpoint.network.fused_experts import expert_block, fused_holders, fused_layer
from quantkit.checkpoint.network.modules import classify
from quantkit.errors import InputError
from quantkit.pipeline.plan import Plan, make_plan
from quantkit.verification.configuration.mixture import check_mixture

PARENT = "model.layers.0.mlp.experts."
CONFIG = {"hidden_size": 64}
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
UNBUILT = {
    "lfm2_moe": "its sizes depend on a list of layer types",
    "zaya": "its config takes one number of experts a token only",
    "deepseek_ocr2": "its sizes depend on a list of layer types",
    "ernie4_5_vl_moe": "its experts are of two sizes",
    "musicgen": "no language model alone",
    "vision-encoder-decoder": "it is made of two models",
    "musicgen_melody": "no language model alone",
}
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "down", "expected"),
    [
        ((4, 128, 64), (4, 64, 64), False),
        ((4, 64, 128), (4, 64, 64), True),
        ((4, 64, 64), (4, 64, 32), False),
        ((4, 64, 64), (4, 32, 64), True),
    ],
)
def test_a_square_tensor_lies_as_its_siblings(
    pair: tuple[int, ...], down: tuple[int, ...], expected: bool
) -> None:
    shapes = {f"{PARENT}gate_up_proj": pair, f"{PARENT}down_proj": down}
    assert {input_first(shapes, CONFIG, name) for name in shapes} == {expected}


def test_codes_that_share_a_byte_are_counted() -> None:
    """A down projection of 256 inputs, two a byte, and 128 outputs is square; its sibling tells."""
    config = {"hidden_size": 128}
    shapes = {f"{PARENT}gate_up_proj": (4, 64, 512), f"{PARENT}down_proj": (4, 128, 128)}
    assert {input_first(shapes, config, name, packed=2) for name in shapes} == {True}
    shapes = {f"{PARENT}gate_up_proj": (4, 512, 64), f"{PARENT}down_proj": (4, 128, 128)}
    assert {input_first(shapes, config, name, packed=2) for name in shapes} == {False}


def test_where_nothing_tells_the_family_does_or_nobody() -> None:
    name = f"{PARENT}down_proj"
    alone = {name: (4, 64, 64)}
    assert input_first(alone, CONFIG, name) is None
    assert input_first(alone, {**CONFIG, "model_type": "gpt_oss"}, name) is True


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("router.proj", "router"),
        ("mlp.router.layer", "router"),
        ("mlp.router.classifier", "router"),
        ("mlp.gate.router_mlp.0", "router"),
        ("altup.modality_router", "router"),
        ("mixer.gate", "router"),
        ("mlp.shared_expert_gate", "router"),
        ("mlp.gate_proj", "linear"),
        ("mlp.gate_up_proj", "linear"),
        ("self_attn.gate", "linear"),
        ("mlp.gating_network", "router"),
        ("moe_gate", "router"),
        ("self_attn.gating", "linear"),
    ],
)
def test_what_routes_is_a_router(module: str, kind: str) -> None:
    shapes = {f"model.layers.0.{module}.weight": (64, 64)}
    assert [found.kind for found in classify(shapes, CONFIG)] == [kind]


def planned(shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], *targets: str) -> Plan:
    file = Path("model.safetensors")
    tensors = {name: TensorInfo(name, "BF16", shape, file, 0, 2) for name, shape in shapes.items()}
    recipe = load_recipe("rtn_fp8_dynamic")
    recipe = recipe.model_copy(update={"targets": [*recipe.targets, *targets]})
    return make_plan(Checkpoint(Path(), config, tensors), recipe)


@pytest.mark.parametrize(
    ("module", "block", "layers"),
    [
        ("x.experts.gate_up_proj", "x.experts", ["x.experts.2.gate_proj", "x.experts.2.up_proj"]),
        ("x.experts.up_proj", "x.experts", ["x.experts.2.up_proj"]),
        ("x.experts.fc1", "x.experts", ["x.experts.2.gate_proj", "x.experts.2.up_proj"]),
        ("x_moe.output_linear", "x_moe.experts", ["x_moe.experts.2.down_proj"]),
    ],
)
def test_what_a_fused_tensor_is_taken_apart_into(
    module: str, block: str, layers: list[str]
) -> None:
    fused = fused_layer(module)
    assert fused is not None
    assert (fused.block, fused.names(2)) == (block, layers)
    assert expert_block(module) == block
    for index, layer in enumerate(layers):
        assert (module, index, len(layers)) in fused_holders(layer)


def test_experts_that_cannot_be_split_are_listed_as_kept() -> None:
    """JetMoE's of attention are no gate, up and down projection."""
    block = "model.layers.0.self_attention.experts"
    shapes = {
        f"{block}.input_linear.weight": (4, 96, 64),
        f"{block}.output_linear.weight": (4, 64, 48),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
    }
    plan = planned(shapes, {**CONFIG, "num_local_experts": 4})
    assert set(plan.kept) == {f"{block}.input_linear", f"{block}.output_linear"}
    assert any("experts stay in 16 bit" in note for note in plan.notes)


def test_experts_that_are_no_modules_are_listed_as_kept() -> None:
    """DBRX's are two dimensions, one expert below the other."""
    name = "transformer.blocks.0.ffn.experts.mlp.w1"
    shapes = {name: (4 * 96, 64), "transformer.blocks.0.attn.Wqkv.weight": (96, 64)}
    plan = planned(shapes, {"d_model": 64, "ffn_config": {"moe_num_experts": 4}})
    assert plan.kept == {name: "experts in a form that no layout here holds"}
    assert any("all experts stay in 16 bit" in note for note in plan.notes)


def test_experts_that_compute_nothing_need_not_be_whole() -> None:
    """Of LongCat's zero experts Transformers saves a first layer and no second one."""
    shapes = {f"{PARENT}{e}.{leaf}_proj.weight": (64, 64) for e in range(4)
              for leaf in ("gate", "up", "down") if e < 3 or leaf != "down"}  # fmt: skip
    config = {**CONFIG, "n_routed_experts": 3}
    modules = classify(shapes, config)
    assert not list(check_mixture(modules, {**config, "zero_expert_num": 1}))
    assert [f.code for f in check_mixture(modules, config)] == ["complete.expert_shape"]


def test_a_target_that_matches_nothing_is_refused() -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (64, 64)}
    assert planned(shapes, CONFIG, "*.q_proj").layers
    with pytest.raises(InputError, match="q_porj"):
        planned(shapes, CONFIG, "*.q_porj")


def test_a_missing_head_is_said_unless_the_embedding_is_it() -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (64, 64)}
    silent = {**CONFIG, "architectures": ["LlamaForCausalLM"]}
    assert any("output head" in note for note in planned(shapes, silent).notes)
    tied = {**silent, "tie_word_embeddings": True}
    assert not any("output head" in note for note in planned(shapes, tied).notes)


def listed_and_routed(shapes: Mapping[str, tuple[int, ...]], plan: Plan) -> None:
    """Every weight is in one of the plan's lists, and what routes is not quantized."""
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) > 1 and not name.endswith("bias"):
            assert module in plan.layers or module in plan.kept, name
        if "router" in name or name.endswith(("mlp.gate.weight", "mixer.gate.weight")):
            assert module not in plan.layers, name


def fits_together(shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    chosen: dict[str, Any] = {
        key: 2 for key in ("num_experts_per_tok", "num_experts_per_token") if key in config
    }
    assert not list(check_mixture(classify(shapes, config), {**config, **chosen}))


def multimodal() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(families()))


def families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("family", [name for name in families() if name not in UNBUILT])
def test_every_family_with_experts(family: str) -> None:
    """Routers kept, experts found, nothing unlisted; `UNBUILT` has those without tiny settings."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    text: Any = CONFIG_MAPPING[family]().get_text_config()
    stated = text.to_dict()
    counts = [key for key in COUNTS if isinstance(stated.get(key), int)]
    if not counts:
        return
    sizes = {key: value for key, value in SIZES.items() if isinstance(stated.get(key), int)}
    sizes |= {"head_dim": SIZES["head_dim"]} if "head_dim" in stated else {}
    tiny = type(text)(**sizes, **dict.fromkeys(counts, 4))
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build(tiny).named_parameters()}
    plan = planned(shapes, tiny.to_dict())
    listed_and_routed(shapes, plan)
    fits_together(shapes, tiny.to_dict())
    if expert_count(tiny.to_dict()):
        assert not any("no tensor is one by name" in note for note in plan.notes)


@pytest.mark.parametrize("family", [name for name in multimodal() if name not in UNBUILT])
def test_every_multimodal_family_with_experts(family: str) -> None:
    """As above; the language model is cut to two layers in place, the tower stays whole."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    whole: Any = CONFIG_MAPPING[family]()
    text = whole.get_text_config()
    stated = text.to_dict()
    counts = [key for key in COUNTS if isinstance(stated.get(key), int)]
    if not counts:
        return
    for key, value in {**SIZES, **dict.fromkeys(counts, 4)}.items():
        if isinstance(stated.get(key), int):
            setattr(text, key, value)
    for key, value in stated.items():
        if isinstance(value, list) and len(value) == stated.get("num_hidden_layers"):
            setattr(text, key, value[: SIZES["num_hidden_layers"]])
    build: Any = AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build(whole).named_parameters()}
    plan = planned(shapes, whole.to_dict())
    listed_and_routed(shapes, plan)
    fits_together(shapes, whole.to_dict())
    assert not [module for module in plan.layers if "vision" in module or ".visual." in module]


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        ({"hidden_size": 8}, 0),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, 2),
        ({"num_experts": 8, "moe_topk": [2, 4]}, 4),
        ({"moe_num_experts": 8, "moe_k": 6}, 6),
        ({"num_experts": 8, "is_moe": False, "num_experts_per_tok": 2}, 0),
    ],
)
def test_how_many_experts_compute_a_token(config: dict[str, Any], chosen: int) -> None:
    assert experts_per_token(config) == chosen
