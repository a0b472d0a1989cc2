"""Tiny random models of real architectures, and checkpoints of every layout made from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.engines.complete_settings import completed
from tests.support.helpers import edit_json, edit_tensors
from tests.support.rtn import ascend_w4a8, rtn

SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
NO_DIM = {key: value for key, value in SMALL.items() if key != "head_dim"}
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
MOE: dict[str, Any] = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
MLA: dict[str, Any] = {
    "q_lora_rank": 128, "kv_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
    "v_head_dim": 64, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
NO_DRAFT: dict[str, Any] = {"num_nextn_predict_layers": 0}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama12": lambda: hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 12}),
    "mistral": lambda: hf.MistralConfig(**SMALL),
    "qwen2": lambda: hf.Qwen2Config(**NO_DIM, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**SMALL),
    "gemma2": lambda: hf.Gemma2Config(**SMALL),
    "phi3": lambda: hf.Phi3Config(**{**NO_DIM, "num_key_value_heads": 4}),
    "glm4": lambda: hf.Glm4Config(**SMALL),
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **NO_DIM, **MOE, num_experts=4, shared_expert_intermediate_size=256
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SMALL, **MOE, num_experts=4),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**NO_DIM, **MOE, **MLA, **NO_DRAFT),
    "glm4_moe": lambda: hf.Glm4MoeConfig(
        **SMALL, **MOE, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, **NO_DRAFT,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    ),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=SMALL, vision_config=VISION, mm_tokens_per_image=4
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        text_config=NO_DIM,
        vision_config={"hidden_size": 64, "intermediate_size": 128, "depth": 1, "num_heads": 2,
                       "out_hidden_size": 256, "patch_size": 14, "spatial_merge_size": 2},
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        text_config=SMALL,
        vision_config={"hidden_size": 64, "intermediate_size": 128, "depth": 1, "num_heads": 2,
                       "out_hidden_size": 256, "patch_size": 14, "deepstack_visual_indexes": [0]},
    ),
}  # fmt: skip

INT4 = SCHEMES["w4a16"]
ASYMMETRIC = INT4.with_weight(symmetric=False)


def model(family: str, out: Path) -> Path:
    """Random weights of a tiny model of that family, saved by Transformers."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    vision = hasattr(config, "vision_config")
    maker: Any = hf.AutoModelForImageTextToText if vision else hf.AutoModelForCausalLM
    maker.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    if not (out / "model.safetensors").exists():
        raise AssertionError(f"{family} was saved in shards")
    return out


def in_layer_0(*leaves: str) -> set[str]:
    """Modules of the first decoder layer, such as `self_attn.q_proj`."""
    return {f"model.layers.0.{leaf}" for leaf in leaves}


QKV = in_layer_0("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = in_layer_0("mlp.gate_proj", "mlp.up_proj")


def modelopt_fp8(source: Path, out: Path, exclude: list[str]) -> Path:
    """A checkpoint in ModelOpt's FP8 format: per-tensor scales, `exclude` left in 16 bit."""
    shutil.copytree(source, out)
    kept = tuple(entry.rstrip("*") for entry in exclude)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight") and not n.startswith(kept)]:
            weight = tensors[name].float()
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
            number = 1 + len(tensors) % 7
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(number / 448)

    edit_tensors(out, change)
    settings = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": exclude}
    document = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": settings}
    (out / "hf_quant_config.json").write_text(json.dumps(document))
    stated = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": exclude}
    edit_json(out / "config.json", lambda config: config.update(quantization_config=stated))
    return out


def auto_round(source: Path, out: Path, others: set[str]) -> Path:
    """An AutoRound checkpoint in GPTQ's packing, `others` in groups of 32, with full settings."""
    mixed(source, out, dict.fromkeys(others, INT4.with_weight(group_size=32)), "gptq")

    def change(config: dict[str, Any]) -> None:
        settings = {
            "quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True,
            "packing_format": "auto_round:auto_gptq", "data_type": "int",
            "extra_config": {name: {"bits": 4, "group_size": 32} for name in sorted(others)},
        }  # fmt: skip
        config["quantization_config"] = completed(settings, config)

    edit_json(out / "config.json", change)
    return out


def mixed(source: Path, out: Path, others: dict[str, Scheme], layout: Any) -> Path:
    """Int4 in groups of 128, but for `others`."""
    from quantkit.backends.streaming.job import StreamOptions
    from quantkit.backends.streaming.run import clear_state, stream_quantize
    from quantkit.checkpoint.directory import open_checkpoint
    from quantkit.checkpoint.network.modules import linear_modules
    from quantkit.formats.base import LayerSpec
    from quantkit.formats.registry import packing, writer_named

    checkpoint = open_checkpoint(source)
    modules = linear_modules(checkpoint.modules)
    layers = {m.name: others.get(m.name, INT4) for m in modules if m.kind == "linear"}
    out.mkdir(parents=True)
    stream_quantize(
        checkpoint, layers, out, options=StreamOptions(layout=layout), shard_size=10**9
    )  # fmt: skip
    clear_state(out)
    specs = {n: LayerSpec(s, packing(s, layout), (0, 0)) for n, s in layers.items()}
    settings = writer_named(layout).quantization_config(specs, ["lm_head"])
    config = {**checkpoint.config, "quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


BASES: dict[str, Callable[[Path, Path], Path]] = {
    "llama w4a16": lambda m, o: rtn(model("llama", m), o, INT4),
    "llama part": lambda m, o: rtn(model("llama", m), o, INT4, keep=QKV | GATE_UP),
    "llama block": lambda m, o: rtn(model("llama", m), o, SCHEMES["fp8_block"]),
    "llama w8a8": lambda m, o: rtn(model("llama", m), o, SCHEMES["w8a8_dynamic"]),
    "llama gptq": lambda m, o: rtn(model("llama", m), o, INT4, layout="gptq"),
    "llama gptq part": lambda m, o: rtn(model("llama", m), o, INT4, layout="gptq", keep=QKV),
    "llama gptq mixed": lambda m, o: mixed(
        model("llama", m), o, dict.fromkeys(QKV, INT4.with_weight(group_size=32)), "gptq"
    ),
    "llama groups": lambda m, o: mixed(
        model("llama", m), o, dict.fromkeys(QKV, SCHEMES["fp8_dynamic"]), "compressed-tensors"
    ),
    "mistral awq": lambda m, o: rtn(model("mistral", m), o, ASYMMETRIC, layout="awq"),
    "mistral awq part": lambda m, o: rtn(
        model("mistral", m), o, ASYMMETRIC, layout="awq", keep=QKV
    ),
    "mistral auto-round": lambda m, o: auto_round(model("mistral", m), o, QKV),
    "llama12 modelopt": lambda m, o: modelopt_fp8(
        model("llama12", m), o, ["lm_head", "model.layers.1.*"]
    ),
    "qwen2 fp8": lambda m, o: rtn(model("qwen2", m), o, SCHEMES["fp8_dynamic"]),
    "qwen2 part": lambda m, o: rtn(model("qwen2", m), o, SCHEMES["fp8_dynamic"], keep=QKV),
    "qwen3 nvfp4a16": lambda m, o: rtn(model("qwen3", m), o, SCHEMES["nvfp4a16"]),
    "qwen3 mxfp4a16": lambda m, o: rtn(model("qwen3", m), o, SCHEMES["mxfp4a16"]),
    "qwen3 modelopt": lambda m, o: modelopt_fp8(
        model("qwen3", m), o, ["lm_head", "model.layers.0.self_attn*"]
    ),
    "gemma2 w4a16": lambda m, o: rtn(model("gemma2", m), o, INT4),
    "glm4 fp8": lambda m, o: rtn(model("glm4", m), o, SCHEMES["fp8_dynamic"]),
    "phi3 block": lambda m, o: rtn(model("phi3", m), o, SCHEMES["fp8_block"]),
    "mixtral fp8": lambda m, o: rtn(model("mixtral", m), o, SCHEMES["fp8_dynamic"]),
    "qwen2_moe fp8": lambda m, o: rtn(
        model("qwen2_moe", m), o, SCHEMES["fp8_dynamic"],
        keep=in_layer_0("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ),
    "qwen3_moe fp8": lambda m, o: rtn(model("qwen3_moe", m), o, SCHEMES["fp8_dynamic"]),
    "qwen3_moe w4a16": lambda m, o: rtn(model("qwen3_moe", m), o, INT4),
    "glm4_moe fp8": lambda m, o: rtn(model("glm4_moe", m), o, SCHEMES["fp8_dynamic"]),
    "deepseek_v3 fp8": lambda m, o: rtn(
        model("deepseek_v3", m), o, SCHEMES["fp8_dynamic"],
        keep=in_layer_0("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ),
    "gemma3 fp8": lambda m, o: rtn(model("gemma3", m), o, SCHEMES["fp8_dynamic"]),
    "qwen2_5_vl fp8": lambda m, o: rtn(model("qwen2_5_vl", m), o, SCHEMES["fp8_dynamic"]),
    "qwen3_vl fp8": lambda m, o: rtn(model("qwen3_vl", m), o, SCHEMES["fp8_dynamic"]),
    "qwen3 ascend": lambda m, o: ascend_w4a8(model("qwen3", m), o),
}  # fmt: skip
"""Sound checkpoints by family and format; each is made from a model in `m` into `o`."""
