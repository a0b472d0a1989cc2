"""Mixtures in the engines' data: of every family a sound plan loads and its broken twin does not.

The modules of a family are those of a checkpoint that Transformers 5 writes of it, one layer of a
kind. No model without rules is said to load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from quantkit.checkpoint.network.modules import Module, classify, linear_modules
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.engines import LayerPart, Loadable, Verdict, engines, judge
from quantkit.engines.aliases import expanded
from quantkit.formats import compressed_tensors_config
from quantkit.formats.base import LayerSpec

Json = dict[str, Any]
COUNT = 4
QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
MLA = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"
GATED = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Mixture:
    """`dense` are modules of layer 0 beside the experts below `block`; `router` is one of them."""

    architecture: str
    router: str
    dense: str = QKV
    block: str = "mlp.experts"
    leaves: tuple[str, ...] = GATED
    layer: str = "model.layers.0."
    loads: tuple[str, ...] = ("vllm", "sglang")


SHARED = " ".join(f"mlp.shared_expert.{leaf}" for leaf in GATED) + " mlp.shared_expert_gate"
FAMILIES = {
    "mixtral": Mixture("MixtralForCausalLM", "block_sparse_moe.gate",
                       block="block_sparse_moe.experts", leaves=MIXTRAL),
    "phimoe": Mixture("PhiMoEForCausalLM", "block_sparse_moe.gate",
                      block="block_sparse_moe.experts", leaves=MIXTRAL),
    "minimax_m2": Mixture("MiniMaxM2ForCausalLM", "block_sparse_moe.gate",
                          block="block_sparse_moe.experts", leaves=MIXTRAL),
    "olmoe": Mixture("OlmoeForCausalLM", "mlp.gate"),
    "qwen2_moe": Mixture("Qwen2MoeForCausalLM", "mlp.gate", f"{QKV} {SHARED}"),
    "qwen3_moe": Mixture("Qwen3MoeForCausalLM", "mlp.gate"),
    "qwen3_next": Mixture("Qwen3NextForCausalLM", "mlp.gate", f"{QKV} {SHARED}"),
    "qwen3_5_moe_text": Mixture("Qwen3_5MoeForCausalLM", "mlp.gate", f"{QKV} {SHARED}"),
    "deepseek_v2": Mixture("DeepseekV2ForCausalLM", "mlp.gate",
                           " ".join(f"self_attn.{leaf}" for leaf in MLA.split())),
    "deepseek_v3": Mixture("DeepseekV3ForCausalLM", "mlp.gate",
                           " ".join(f"self_attn.{leaf}" for leaf in MLA.split())),
    "glm4_moe_lite": Mixture("Glm4MoeLiteForCausalLM", "mlp.gate",
                             " ".join(f"self_attn.{leaf}" for leaf in MLA.split())),
    "longcat_flash": Mixture("LongcatFlashForCausalLM", "mlp.router.classifier",
                             " ".join(f"self_attn.0.{leaf}" for leaf in MLA.split())),
    "glm4_moe": Mixture("Glm4MoeForCausalLM", "mlp.gate"),
    "ernie4_5_moe": Mixture("Ernie4_5_MoeForCausalLM", "mlp.gate"),
    "mimo_v2_flash": Mixture("MiMoV2FlashForCausalLM", "mlp.gate"),
    "afmoe": Mixture("AfmoeForCausalLM", "mlp.router.gate", f"{QKV} self_attn.gate_proj"),
    "lfm2_moe": Mixture("Lfm2MoeForCausalLM", "feed_forward.gate",
                        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj "
                        "conv.in_proj conv.out_proj feed_forward.w1 feed_forward.w3 "
                        "feed_forward.w2", block="feed_forward.experts", leaves=MIXTRAL),
    "granitemoe": Mixture("GraniteMoeForCausalLM", "block_sparse_moe.router.layer",
                          block="block_sparse_moe.experts"),
    "granitemoeshared": Mixture("GraniteMoeSharedForCausalLM", "block_sparse_moe.router.layer",
                                f"{QKV} shared_mlp.input_linear shared_mlp.output_linear",
                                block="block_sparse_moe.experts"),
    "granitemoehybrid": Mixture("GraniteMoeHybridForCausalLM", "block_sparse_moe.router.layer",
                                f"{QKV} mamba.in_proj mamba.out_proj",
                                block="block_sparse_moe.experts"),
    "nemotron_h": Mixture("NemotronHForCausalLM", "mixer.gate", "mixer.in_proj mixer.out_proj",
                          block="mixer.experts", leaves=("up_proj", "down_proj"),
                          layer="backbone.layers.0."),
    "gemma4_text": Mixture("Gemma4ForCausalLM", "router.proj", block="experts"),
    "llama4_text": Mixture("Llama4ForCausalLM", "feed_forward.router",
                           block="feed_forward.experts"),
    "jamba": Mixture("JambaForCausalLM", "feed_forward.router", block="feed_forward.experts",
                     loads=("vllm",)),
    "flex_olmo": Mixture("FlexOlmoForCausalLM", "mlp.gate", loads=("vllm",)),
    "hunyuan_v1_moe": Mixture("HunYuanMoEV1ForCausalLM", "mlp.gate.wg"),
}  # fmt: skip
ENGINES = [(f, e) for f, mixture in FAMILIES.items() for e in mixture.loads]
PAIRS = pytest.mark.parametrize(("family", "engine"), ENGINES)
READ_THEIR_OWN = {"vllm": ("qwen3_moe", "lfm2_moe", "flex_olmo", "hunyuan_v1_moe")}
"""Engine → families whose router takes the settings: a list has to name it."""


def config_of(family: str) -> Json:
    return {
        "model_type": family, "architectures": [FAMILIES[family].architecture],
        "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "num_hidden_layers": 1, "num_experts": COUNT, "num_local_experts": COUNT,
        "n_routed_experts": COUNT, "num_experts_per_tok": 2, "vocab_size": 512,
    }  # fmt: skip


def modules_of(mixture: Mixture) -> list[Module]:
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (512, 256)}
    for name in mixture.dense.split():
        rows = 1 if name.endswith("shared_expert_gate") else 256
        shapes[f"{mixture.layer}{name}.weight"] = (rows, 256)
    shapes[f"{mixture.layer}{mixture.router}.weight"] = (COUNT, 256)
    for number in range(COUNT):
        for leaf in mixture.leaves:
            shapes[f"{mixture.layer}{mixture.block}.{number}.{leaf}.weight"] = (256, 256)
    return linear_modules(classify(shapes, {"num_experts": COUNT, "vocab_size": 512}))


def planned(family: str, *, experts: bool = True, router: bool = False) -> Loadable:
    """FP8 with a list of what stays, by every engine's names; `experts`, `router`: quantized?"""
    mixture, config = FAMILIES[family], config_of(family)
    scheme, parts, kept = SCHEMES["fp8_dynamic"], {}, []
    for module in modules_of(mixture):
        one = module.name.startswith(f"{mixture.layer}{mixture.block}.")
        held = experts if one else module.kind == "linear"
        held = router if module.name == f"{mixture.layer}{mixture.router}" else held
        if not held:
            kept.append(module.name)
        parts[module.name] = LayerPart(
            module.name, module.kind, module.shape, scheme if held else None,
            "float-quantized" if held else "",
        )  # fmt: skip
    spec = LayerSpec(scheme, "float-quantized", (256, 256))
    quantized = [name for name, part in parts.items() if part.scheme]
    settings = compressed_tensors_config.quantization_config(
        dict.fromkeys(quantized, spec), expanded(kept, config)
    )
    for group in settings["config_groups"].values():
        group["targets"] = ["Linear"]
    return Loadable(config, "compressed-tensors", settings, parts)


def told(loadable: Loadable, engine: str, tp: int = 1) -> Verdict:
    return judge(loadable, (engine,), (tp,))[0]


def codes(verdict: Verdict) -> set[str]:
    return {reason.code for reason in verdict.reasons}


@PAIRS
def test_a_sound_plan_loads(family: str, engine: str) -> None:
    verdict = told(planned(family), engine)
    assert verdict.loads, (verdict.unknown, verdict.reasons)


@PAIRS
def test_experts_in_16_bit_are_found_in_the_list(family: str, engine: str) -> None:
    plan = planned(family, experts=False)
    verdict = told(plan, engine)
    assert verdict.loads, (verdict.unknown, verdict.reasons)
    bare = {**plan.settings, "ignore": ["lm_head"]}
    assert "engine.ignore_unmatched" in codes(told(replace(plan, settings=bare), engine))


@PAIRS
def test_a_quantized_router_is_refused_where_it_is_built_in_16_bit(
    family: str, engine: str
) -> None:
    found = codes(told(planned(family, router=True), engine))
    assert ("engine.quantized_router" in found) == (family not in READ_THEIR_OWN.get(engine, ()))


@PAIRS
def test_experts_under_another_family_s_names(family: str, engine: str) -> None:
    both = engine == "vllm" and family in ("mixtral", "flex_olmo", "hunyuan_v1_moe")
    plan, mixture = planned(family), FAMILIES[family]
    mine, others = mixture.leaves, MIXTRAL if mixture.leaves == GATED else GATED
    new = dict(zip(mine, others if len(mine) == len(others) else ("w1", "w2"), strict=True))
    parts = {}
    for name, part in plan.parts.items():
        head, _dot, leaf = name.rpartition(".")
        renamed = f"{head}.{new[leaf]}" if ".experts." in name or "experts." in head else name
        parts[renamed] = replace(part, name=renamed)
    found = codes(told(replace(plan, parts=parts), engine))
    assert ("engine.expert_names" in found) != both


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_experts_that_cannot_be_cut_are_spread(engine: str) -> None:
    plan = planned("qwen3_moe")
    parts = {
        name: replace(part, shape=(100, 256) if "down" not in name else (256, 100))
        if ".experts." in name
        else part
        for name, part in plan.parts.items()
    }
    config = {**plan.config, "num_attention_heads": 8, "num_key_value_heads": 8}
    whole = told(replace(plan, parts=parts, config=config), engine, tp=8)
    assert codes(whole) == {"engine.tp_split"}
    assert whole.spread
    assert engines()[engine].spread_experts in whole.reasons[0].fix
    assert whole.to_json()["expert_parallel"] is True
    assert told(plan, engine).spread is None


def bare(family: str, architecture: str) -> Loadable:
    part = LayerPart(
        "model.layers.0.mlp.down_proj", "linear", (256, 256), SCHEMES["fp8_dynamic"],
        "float-quantized",
    )  # fmt: skip
    config = {"model_type": family, "architectures": [architecture]}
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "float"}}}
    return Loadable(config, "compressed-tensors", {"config_groups": groups}, {part.name: part})


def test_no_model_without_rules_is_said_to_load() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    seen = dict.fromkeys(("loads", "refuses", "unknown"), 0)
    for family, architecture in names.items():
        if not isinstance(architecture, str):
            continue
        for engine in engines().values():
            plan = bare(family, architecture)
            verdict = told(plan, engine.engine)
            rules = engine.family(plan.config).known and architecture in engine.architectures
            seen[verdict.outcome] += 1
            assert rules or not verdict.loads, (engine.engine, family)
            if verdict.outcome == "unknown":
                assert verdict.unknown
                assert verdict.to_json()["loads"] is None
                assert verdict.title.startswith("Whether ")
    assert min(seen.values()) > 10


@pytest.mark.parametrize(
    ("family", "architecture", "engine", "outcome"),
    [
        ("jetmoe", "JetMoeForCausalLM", "vllm", "unknown"),
        ("phimoe", "PhimoeForCausalLM", "vllm", "unknown"),  # the class is called PhiMoE…
        ("dots1", "Dots1ForCausalLM", "vllm", "unknown"),
        ("solar_open", "SolarOpenForCausalLM", "sglang", "unknown"),
        ("jamba", "JambaForCausalLM", "sglang", "refuses"),
        ("falcon", "FalconForCausalLM", "sglang", "refuses"),
        ("dbrx", "DbrxForCausalLM", "vllm", "refuses"),
        ("dbrx", "DbrxForCausalLM", "sglang", "loads"),
        ("llama", "LlamaForSequenceClassification", "vllm", "loads"),
        ("llama", "LlamaForCausalLM", "sglang", "loads"),
    ],
)
def test_what_an_engine_has_no_class_for(
    family: str, architecture: str, engine: str, outcome: str
) -> None:
    verdict = told(bare(family, architecture), engine)
    assert verdict.outcome == outcome
    if outcome == "refuses":
        assert codes(verdict) == {"engine.architecture"}
    if outcome == "unknown":
        assert family in verdict.unknown or architecture in verdict.unknown


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_no_model_has_is_refused_without_rules(engine: str) -> None:
    plan = replace(
        bare("novelnet", "NovelForCausalLM"), layout="ascend" if engine == "vllm" else "mx"
    )
    assert told(plan, engine).refuses
