"""Checkpoints and plans as public threads describe them: each broken in one way, with its code.

A `Seed` changes a sound checkpoint of `tests.families`; an `Asked` asks a plan for what an engine
cannot do. `thread` is where the failure was reported, or the engine's source that raises it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.damage import configuring, dropping, patching, set_first
from tests.helpers import edit_json, edit_tensors

Json = dict[str, Any]
L0 = "model.layers.0."


@dataclass(frozen=True)
class Seed:
    """`change` breaks a copy of `base`; `engine` must then refuse it with `code`."""

    name: str
    base: str
    change: Callable[[Path], object]
    code: str
    engine: str = "vllm"
    thread: str = ""


@dataclass(frozen=True)
class Asked:
    """A plan for `config` (config.json alone) with `method`; `flags` are refused with `code`, and
    `twin` (the same but for one thing) is accepted."""

    name: str
    config: Json
    method: str
    flags: tuple[str, ...]
    code: str
    twin: Json = field(default_factory=dict)
    twin_flags: tuple[str, ...] | None = None
    twin_method: str = ""
    thread: str = ""


def settings(change: Callable[[Json], object]) -> Callable[[Path], None]:
    """Change the quantization settings in config.json."""
    return configuring(lambda config: change(config["quantization_config"]))


def unlisted(*endings: str, key: str = "ignore") -> Callable[[Path], None]:
    """Take the entries with these endings off a list."""

    def change(quantization: Json) -> None:
        kept = [entry for entry in quantization[key] if not entry.endswith(endings)]
        assert len(kept) < len(quantization[key])
        quantization[key] = kept

    return settings(change)


def instead(key: str, *entries: str) -> Callable[[Path], None]:
    return settings(lambda quantization: quantization.update({key: list(entries)}))


def renamed_entries(old: str, new: str) -> Callable[[Path], None]:
    def change(quantization: Json) -> None:
        quantization["ignore"] = [e.replace(old, new) for e in quantization["ignore"]]

    return settings(change)


def without_rules(part: str, key: str = "dynamic") -> Callable[[Path], None]:
    """Take the rules that name `part` out of a table."""

    def change(quantization: Json) -> None:
        kept = {rule: value for rule, value in quantization[key].items() if part not in rule}
        assert len(kept) < len(quantization[key])
        quantization[key] = kept

    return settings(change)


def modelopt_lists(*entries: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        instead("ignore", *entries)(directory)
        edit_json(
            directory / "hf_quant_config.json",
            lambda c: c["quantization"].update(exclude_modules=list(entries)),
        )

    return apply


def in_16_bit(module: str) -> Callable[[Path], None]:
    """One module back in 16 bit, listed as such."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{module}.weight"]
        for name in [n for n in tensors if n.startswith(f"{module}.weight")]:
            del tensors[name]
        tensors[f"{module}.weight"] = torch.full(weight.shape, 0.01, dtype=torch.bfloat16)

    def apply(directory: Path) -> None:
        edit_tensors(directory, change)
        settings(lambda quantization: quantization["ignore"].append(module))(directory)

    return apply


def fp8_of(module: str) -> Callable[[Path], None]:
    """FP8 codes and a scale for a module that is listed as 16 bit, and off the list with it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{module}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors[f"{module}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = scale.to(torch.bfloat16)

    def apply(directory: Path) -> None:
        edit_tensors(directory, change)
        unlisted(module)(directory)

    return apply


def inputs(**changes: Any) -> Callable[[Path], None]:
    def change(quantization: Json) -> None:
        group = quantization["config_groups"]["group_0"]
        group["input_activations"] = {**group["weights"], **changes}

    return settings(change)


def targets_without(ending: str) -> Callable[[Path], None]:
    def change(quantization: Json) -> None:
        for group in quantization["config_groups"].values():
            group["targets"] = [t for t in group["targets"] if not t.endswith(ending)]

    return settings(change)


KV_INT8: Json = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}
EXPERT = f"{L0}mlp.experts.1."

SEEDS: tuple[Seed, ...] = (
    # the list says a name that the engine has not got (pains 1)
    Seed("q, k and v listed, their merged layer not", "llama part", unlisted("qkv_proj"),
         "engine.ignore_unmatched", "sglang", "sglang#36596"),
    Seed("gate and up listed, their merged layer not", "llama part", unlisted("gate_up_proj"),
         "engine.ignore_unmatched", "sglang", "sglang#36596"),
    Seed("merged layer not listed, Qwen2", "qwen2 part", unlisted("qkv_proj"),
         "engine.ignore_unmatched", "sglang", "sglang#38781"),
    Seed("one member not listed", "qwen2 part", unlisted("k_proj", "qkv_proj"),
         "engine.ignore_partial", "vllm", "vllm#54547"),
    Seed("entries of a wrapper's prefix", "qwen2 part",
         renamed_entries("model.layers", "language_model.layers"), "engine.ignore_unmatched",
         "vllm", "vllm#54547"),
    Seed("a glob where regular expressions are read", "qwen3_moe fp8",
         instead("ignore", "lm_head", "model.layers.*.mlp.gate"), "engine.ignore_unmatched", "vllm",
         "vllm#54547"),
    Seed("an expression that does not begin at the start", "qwen3_moe fp8",
         instead("ignore", "lm_head", "re:mlp.gate$"), "engine.ignore_unmatched", "vllm",
         "vllm#54547"),
    Seed("a shared expert's merged layer not listed", "qwen2_moe fp8", unlisted("gate_up_proj"),
         "engine.ignore_unmatched", "vllm", "vLLM qwen2_moe.py packed_modules_mapping"),
    Seed("latent attention's merged layer, one member listed", "deepseek_v3 fp8",
         unlisted("kv_a_proj_with_mqa", "fused_qkv_a_proj"), "engine.ignore_partial", "vllm",
         "vllm#54547"),
    Seed("vision tower not listed", "gemma3 fp8", unlisted("out_proj"), "engine.ignore_unmatched",
         "vllm", "sglang#38781"),
    Seed("vision tower by another name", "gemma3 fp8",
         renamed_entries("vision_tower", "visual"), "engine.ignore_unmatched", "vllm",
         "sglang#38781"),
    Seed("tower of Qwen2.5-VL not listed", "qwen2_5_vl fp8", unlisted("qkv", "qkv_proj"),
         "engine.ignore_unmatched", "sglang", "SGLang documentation, VLM failure cases"),
    Seed("language model of Qwen3-VL under the wrong prefix", "qwen3_vl fp8",
         lambda d: (in_16_bit("model.language_model.layers.0.self_attn.o_proj")(d),
                    renamed_entries("model.language_model.layers", "language.layers")(d)),
         "engine.ignore_unmatched", "vllm", "vllm#54547"),
    Seed("a prefix that is part of other names", "llama12 modelopt",
         modelopt_lists("lm_head", "model.layers.1"), "engine.ignore_overreach", "vllm",
         "vLLM modelopt.py: entries match as substrings"),
    Seed("one member of a merged layer, ModelOpt", "qwen3 modelopt",
         modelopt_lists("lm_head", f"{L0}self_attn.q_proj", f"{L0}self_attn.o_proj"),
         "engine.ignore_partial", "vllm", "vllm#54547"),
    Seed("output head not listed, ModelOpt", "llama12 modelopt",
         modelopt_lists("model.layers.1.*"), "engine.ignore_unmatched", "sglang", "vllm#45102"),
    Seed("mlp.gate names mlp.gate_up_proj too", "mistral awq",
         instead("modules_to_not_convert", "lm_head", "mlp.gate"), "declared.unexpected_scales",
         "vllm", "Qwen3.6-FP8: comment in SGLang quantization/utils.py"),
    Seed("merged layer not listed, AWQ", "mistral awq part",
         unlisted("qkv_proj", key="modules_to_not_convert"), "engine.ignore_unmatched", "sglang",
         "sglang#36596"),
    Seed("merged layer in no rule, GPTQ", "llama gptq part", without_rules("qkv_proj"),
         "engine.ignore_unmatched", "sglang", "sglang#36596"),
    # settings that hold for members and not for what they are merged into
    Seed("settings of merged layers, GPTQ", "llama gptq mixed", without_rules("qkv_proj"),
         "engine.target_mismatch", "vllm", "AutoRound limits in SGLang's documentation"),
    Seed("settings of merged layers, AutoRound", "mistral auto-round",
         without_rules("qkv_proj", key="extra_config"), "engine.target_mismatch", "sglang",
         "AutoRound limits in SGLang's documentation"),
    Seed("targets of merged layers", "llama groups", targets_without("qkv_proj"),
         "engine.ignore_overreach", "sglang", "SGLang find_matched_target"),
    # one layer, two schemes (pains 4)
    Seed("k in 16 bit beside q and v", "llama w8a8", in_16_bit(f"{L0}self_attn.k_proj"),
         "engine.mixed_group", "vllm", "vllm#54974"),
    Seed("up in 16 bit beside gate", "glm4_moe fp8", in_16_bit(f"{L0}mlp.up_proj"),
         "engine.mixed_group", "sglang", "vllm#54974"),
    Seed("q_a in FP8 beside kv_a", "deepseek_v3 fp8", fp8_of(f"{L0}self_attn.q_a_proj"),
         "engine.mixed_group", "sglang", "vllm#54974"),
    Seed("q_a in FP8 beside kv_a, second engine", "deepseek_v3 fp8",
         fp8_of(f"{L0}self_attn.q_a_proj"), "engine.mixed_group", "vllm", "vllm#54974"),
    Seed("one expert in 16 bit", "qwen3_moe fp8", in_16_bit(f"{EXPERT}down_proj"),
         "engine.mixed_experts", "vllm", "llm-compressor#1427"),
    Seed("one expert in 16 bit, Mixtral", "mixtral fp8",
         in_16_bit(f"{L0}block_sparse_moe.experts.1.w2"),
         "engine.mixed_experts", "sglang", "llm-compressor#1427"),
    Seed("unequal FP4 global scales", "qwen3 nvfp4a16",
         patching(f"{L0}self_attn.k_proj.weight_global_scale", lambda t: t * 2),
         "structure.global_scales_differ", "vllm", "vllm#54974"),
    # routers (pains 3)
    Seed("router not listed", "qwen3_moe fp8", unlisted("mlp.gate"), "engine.ignore_unmatched",
         "vllm", "sglang#16716"),
    Seed("router not listed, int4", "qwen3_moe w4a16", unlisted("mlp.gate"),
         "engine.ignore_unmatched", "sglang", "sglang#16716"),
    Seed("router in FP8", "qwen3_moe fp8", fp8_of(f"{L0}mlp.gate"), "structure.router_quantized",
         "vllm", "SGLang documentation: no kernel for mlp.gate"),
    Seed("router in FP8, built in 16 bit", "glm4_moe fp8", fp8_of("model.layers.1.mlp.gate"),
         "engine.quantized_router", "vllm", "sglang#16716"),
    # settings and tensors disagree (pains 2)
    Seed("FP8 scales for a listed layer", "qwen2 part",
         lambda d: edit_tensors(d, lambda t: t.update(
             {f"{L0}self_attn.q_proj.weight_scale": torch.ones(512, 1)})),
         "declared.unexpected_scales", "vllm", "vllm#45102"),
    Seed("no scales for a declared layer", "glm4 fp8",
         dropping(f"{L0}self_attn.o_proj.weight_scale"), "declared.missing_tensor", "vllm",
         "vllm#45102"),
    Seed("FP4 weights with 8-bit activations", "qwen3 nvfp4a16", inputs(num_bits=8, dynamic=True),
         "declared.scheme_pair", "vllm", "vLLM: NVFP4 weights need NVFP4 inputs"),
    Seed("MX weights with integer activations", "qwen3 mxfp4a16",
         inputs(num_bits=8, type="int", strategy="token", group_size=None, dynamic=True,
                scale_dtype=None),
         "declared.scheme_pair", "vllm", "vllm#45102"),
    # values that calibration left (pains 10, 12)
    Seed("an expert never seen in calibration", "qwen3_moe fp8",
         patching(f"{EXPERT}up_proj.weight_scale", set_first(0.0)), "scale.zero", "vllm",
         "llm-compressor PR#2826"),
    Seed("a NaN scale", "gemma2 w4a16",
         patching(f"{L0}mlp.down_proj.weight_scale", set_first(float("nan"))), "scale.nonfinite",
         "vllm", "compressed-tensors#832"),
    Seed("an INT8 KV cache", "llama w8a8",
         settings(lambda q: q.update(kv_cache_scheme=KV_INT8)), "engine.kv_cache", "vllm",
         "llm-compressor#1949"),
    # a part of the source is missing (pains 5)
    Seed("a layer's MLP is gone", "phi3 block", dropping("model.layers.1.mlp.down_proj"),
         "complete.missing_module", "vllm", "sglang#35797"),
    Seed("tie flag flipped", "qwen2 fp8", configuring(lambda c: c.update(
        tie_word_embeddings=False)), "complete.no_head", "vllm", "ModelOpt 0.47 changelog"),
    # no kernel
    Seed("columns out of order", "llama gptq",
         settings(lambda q: q.update(desc_act=True)), "engine.act_order", "vllm",
         "vLLM: desc_act is no longer supported"),
    Seed("columns out of order by a rule", "llama gptq mixed", settings(lambda q: q.update(
        dynamic={**q["dynamic"], r"+:.*o_proj$": {"desc_act": True}})), "engine.act_order", "vllm",
         "vLLM gptq_utils.py normalize_and_validate_gptq_desc_act"),
    Seed("columns out of order, compressed-tensors", "llama w4a16",
         settings(lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group")),
         "engine.act_order", "vllm", "vLLM compressed_tensors.py: no longer supported"),
    Seed("AutoRound in GPTQModel's packing", "mistral auto-round",
         settings(lambda q: q.update(packing_format="auto_round:gptqmodel")), "engine.packing",
         "sglang", "AutoRound limits in SGLang's documentation"),
)  # fmt: skip

DENSE: Json = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
_MOE: Json = {
    **DENSE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 1536, "head_dim": 128,
}  # fmt: skip
_MLA: Json = {
    **DENSE, "model_type": "deepseek_v3", "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 8,
    "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 1,
}  # fmt: skip
VLLM, SGLANG = ("--engine", "vllm"), ("--engine", "sglang")
_GLM4: Json = {
    **DENSE, "model_type": "glm4", "head_dim": 128, "intermediate_size": 13696,
    "num_key_value_heads": 2, "attention_bias": True,
}  # fmt: skip
_PHI3: Json = {"model_type": "phi3", "head_dim": None, "num_key_value_heads": 32}
_GPTQ = ("--set", "options.layout=gptq")
_KV_B = ("--set", "ignore+=re:.*kv_b_proj")
_A_PROJ = ("--set", "ignore+=re:.*q_a_proj", "--set", "ignore+=re:.*kv_a_proj_with_mqa")
_DESC_ACT = ("--set", "options.act_group_aware=false", "--set", "options.desc_act=true")
_AWQ = ("--set", "options.layout=awq", "--set", "group_size=32", "--set", "symmetric=false")

PLANS: tuple[Asked, ...] = (
    # shards (pains 6)
    Asked("group size and 8 ranks", {**DENSE, "intermediate_size": 11008}, "rtn_w4a16",
          (*VLLM, "--tp", "8"), "engine.tp_group", twin_flags=(*VLLM, "--tp", "2"),
          thread="vllm#11671"),
    Asked("group size and 4 ranks, Qwen2", {**DENSE, "model_type": "qwen2",
          "intermediate_size": 18944}, "rtn_w4a16", (*SGLANG, "--tp", "8"), "engine.tp_group",
          twin_flags=(*SGLANG, "--tp", "4"), thread="vllm#5675"),
    Asked("experts and 8 ranks", _MOE, "rtn_w4a16", (*VLLM, "--tp", "8"), "engine.tp_group",
          twin_flags=(*VLLM, "--tp", "8", "--set", "group_size=64"), thread="Qwen3-VL#831"),
    Asked("experts' blocks and 8 ranks", _MOE, "rtn_fp8_block", (*VLLM, "--tp", "8"),
          "engine.block_shape", twin_flags=(*VLLM, "--tp", "4"), thread="Qwen3-VL#831"),
    Asked("blocks of a merged layer", {**DENSE, "hidden_size": 576, "intermediate_size": 1536,
          "num_attention_heads": 9, "num_key_value_heads": 3}, "rtn_fp8_block", VLLM,
          "engine.block_shape", twin_method="rtn_fp8_dynamic", thread="vLLM fp8_utils.py"),
    Asked("blocks of a layer stored merged", {**DENSE, "model_type": "phi3", "hidden_size": 3072,
          "intermediate_size": 8256, "num_key_value_heads": 32}, "rtn_fp8_block", SGLANG,
          "engine.block_shape", twin={"intermediate_size": 8192}, thread="vLLM fp8_utils.py"),
    Asked("heads and ranks", {**DENSE, "hidden_size": 896, "num_attention_heads": 14,
          "num_key_value_heads": 2, "intermediate_size": 4864}, "rtn_fp8_dynamic",
          (*VLLM, "--tp", "4"), "engine.tp_heads", twin_flags=(*VLLM, "--tp", "2"),
          thread="vllm#5675"),
    Asked("key/value heads and ranks", {**DENSE, "num_key_value_heads": 10,
          "num_attention_heads": 40, "hidden_size": 5120}, "rtn_fp8_dynamic",
          (*SGLANG, "--tp", "4"), "engine.tp_heads", twin_flags=(*SGLANG, "--tp", "2"),
          thread="vllm#5675"),
    Asked("an MLP that cannot be cut", {**DENSE, "intermediate_size": 6148}, "rtn_fp8_dynamic",
          (*VLLM, "--tp", "8"), "engine.tp_split", twin={"intermediate_size": 6144},
          thread="vllm#5675"),
    Asked("packed words and ranks", {**DENSE, "model_type": "mistral", "hidden_size": 6400,
          "num_attention_heads": 64, "head_dim": 100}, "rtn_w4a16",
          (*VLLM, "--tp", "8", *_AWQ), "engine.multiple_of", twin_flags=(*VLLM, "--tp", "4", *_AWQ),
          thread="vllm#5675"),
    Asked("Marlin tiles", {**DENSE, "hidden_size": 576, "intermediate_size": 1536,
          "num_attention_heads": 9, "num_key_value_heads": 3}, "rtn_w4a16",
          (*SGLANG, "--set", "group_size=64"), "engine.tile",
          twin_flags=(*VLLM, "--set", "group_size=64"), thread="SGLang marlin_utils.py"),
    # kernels (pains 7)
    Asked("INT8 experts", _MOE, "rtn_w8a8_dynamic", SGLANG, "engine.moe_scheme", twin_flags=VLLM,
          thread="vllm#19853"),
    Asked("MXFP4 on dense layers", DENSE, "rtn_mxfp4a16", SGLANG, "engine.scheme",
          twin_flags=VLLM, thread="llm-compressor#1427"),
    Asked("3 bits", DENSE, "gptqmodel_w3a16", VLLM, "engine.scheme",
          twin_method="gptqmodel_w4a16", thread="vLLM auto_gptq.py"),
    Asked("2 bits of AutoRound", DENSE, "autoround_w2a16", SGLANG,
          "engine.scheme", twin_method="autoround_w4a16", thread="llm-compressor#1427"),
    Asked("ModelOpt's INT4 AWQ", DENSE, "modelopt_int4_awq", VLLM, "engine.scheme",
          twin_method="modelopt_fp8", thread="vLLM modelopt.py QUANT_ALGOS"),
    Asked("ModelOpt's INT8 SmoothQuant", DENSE, "modelopt_int8_sq", SGLANG, "engine.scheme",
          twin_method="modelopt_fp8", thread="SGLang modelopt_quant.py"),
    Asked("group size 256", DENSE, "rtn_w4a16", (*SGLANG, "--set", "group_size=256"),
          "engine.group_size", twin_flags=(*SGLANG, "--set", "group_size=128"),
          thread="SGLang MARLIN_SUPPORTED_GROUP_SIZES"),
    Asked("zero points in GPTQ's layout", DENSE, "rtn_w4a16",
          (*VLLM, "--set", "options.layout=gptq", "--set", "symmetric=false"),
          "engine.asymmetric", twin_flags=(*VLLM, "--set", "options.layout=gptq"),
          thread="vLLM auto_gptq.py TYPE_MAP"),
    Asked("FP8 of ModelOpt on an A100", DENSE, "modelopt_fp8", (*SGLANG, "--gpu", "a100"),
          "engine.gpu", twin_flags=(*SGLANG, "--gpu", "h100"), thread="SGLang platform table"),
    Asked("Marlin on AMD", DENSE, "rtn_w4a16", (*SGLANG, "--gpu", "mi300x"), "engine.gpu",
          twin_flags=(*SGLANG, "--gpu", "l40s"), thread="SGLang platform table"),
    Asked("FP8 on Ascend", DENSE, "rtn_fp8_dynamic", (*SGLANG, "--gpu", "ascend-a2"),
          "engine.gpu", twin_method="rtn_w8a8_dynamic", thread="SGLang platform table"),
    Asked("Ascend's layout in vLLM", DENSE, "msmodelslim_w8a8", VLLM, "engine.layout",
          twin_flags=(*SGLANG, "--gpu", "ascend-a3"), thread="SGLang platform table"),
    Asked("GPTQ on AMD", DENSE, "rtn_w4a16", (*SGLANG, *_GPTQ, "--gpu", "mi300x"), "engine.gpu",
          twin_flags=(*SGLANG, *_GPTQ, "--gpu", "h100"),
          thread="SGLang model_config.py rocm_supported_quantization"),
    Asked("AutoRound's GPTQ packing on AMD", DENSE, "autoround_w4a16",
          (*SGLANG, "--gpu", "mi300x"), "engine.gpu", twin_flags=(*SGLANG, "--gpu", "h100"),
          thread="SGLang auto_round.py apply_gptq_quant_layer"),
    # weights that a model's own code takes apart
    Asked("packed kv_b_proj", _MLA, "rtn_w4a16", SGLANG, "engine.packing",
          twin_flags=(*SGLANG, *_KV_B), thread="SGLang deepseek_weight_loader.py post_load_weights"),
    Asked("NVFP4 kv_b_proj", _MLA, "rtn_nvfp4a16", SGLANG, "engine.packing",
          twin_flags=(*SGLANG, *_KV_B), thread="SGLang deepseek_weight_loader.py post_load_weights"),
    Asked("kv_b_proj in GPTQ's packing", {**_MLA, "q_lora_rank": None}, "rtn_w4a16",
          (*SGLANG, *_GPTQ), "engine.packing", twin_flags=(*SGLANG, *_GPTQ, *_KV_B),
          thread="SGLang deepseek_weight_loader.py post_load_weights"),
    Asked("packed kv_b_proj in 8 bit", _MLA | {"model_type": "deepseek_v2"}, "rtn_w8a16", SGLANG,
          "engine.packing", twin_method="rtn_fp8_dynamic",
          thread="SGLang deepseek_weight_loader.py post_load_weights"),
    Asked("latent projections in GPTQ's packing", _MLA, "rtn_w4a16",
          (*SGLANG, *_GPTQ, *_KV_B), "engine.packing",
          twin_flags=(*SGLANG, *_GPTQ, *_KV_B, *_A_PROJ),
          thread="SGLang deepseek_weight_loader.py cat_dim"),
    # columns out of order
    Asked("actorder group", DENSE, "llmcompressor_w4a16",
          (*VLLM, "--set", "options.actorder=group"), "engine.act_order",
          twin_flags=(*VLLM, "--set", "options.actorder=static"),
          thread="vLLM compressed_tensors.py: no longer supported"),
    Asked("desc_act of a plan", DENSE, "gptqmodel_w4a16",
          (*VLLM, *_DESC_ACT), "engine.act_order", twin_flags=(*SGLANG, *_DESC_ACT),
          thread="vLLM: desc_act is no longer supported"),
    # a layer stored merged
    Asked("GPTQ of a layer stored merged", _GLM4, "rtn_w4a16", (*VLLM, *_GPTQ),
          "engine.ignore_overreach", twin=_PHI3, thread="vLLM gptq_utils.py is_layer_gptq_quantized"),
    Asked("blocks of a layer stored merged, GLM-4", _GLM4, "rtn_fp8_block", (*VLLM, "--tp", "2"),
          "engine.block_shape", twin={"intermediate_size": 13824}, thread="vLLM fp8_utils.py"),
    # ModelOpt's blocks
    Asked("blocks of merged parts, ModelOpt", {**DENSE, "hidden_size": 2048, "head_dim": 64,
          "intermediate_size": 8192}, "modelopt_fp8_pb_wo", (*VLLM, "--tp", "8"),
          "engine.block_shape", twin_flags=(*VLLM, "--tp", "4"),
          thread="vLLM linear.py adjust_block_scale_shard"),
    Asked("blocks of q, k and v on one device, ModelOpt", {**DENSE, "hidden_size": 896,
          "num_attention_heads": 14, "num_key_value_heads": 1, "intermediate_size": 4864},
          "modelopt_fp8_pb_wo", VLLM, "engine.block_shape", twin={"num_key_value_heads": 2},
          thread="vLLM linear.py adjust_block_scale_shard"),
    Asked("GGUF in vLLM", DENSE, "autoround_gguf_q4_k_m", VLLM, "engine.layout",
          twin_flags=SGLANG, thread="SGLang platform table"),
)  # fmt: skip
