"""Checkpoints as public threads describe them: each broken in one way, with its code.

A `Seed` changes a sound checkpoint of `tests.support.families`. `thread` is where the failure was
reported, or the engine's source that raises it. Plans of that kind are in
`tests.engines.refused_plans`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.damage import configuring, dropping, patching, set_first
from tests.support.helpers import edit_json, edit_tensors

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
         "engine.ignore_unmatched", "vllm", "sglang#16716"),
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
         "format.unsupported", "vllm", "vllm#45102"),
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
