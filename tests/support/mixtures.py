"""Tiny random mixtures of experts, one of every family of Transformers that people quantize."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.fused_experts import fused_layer
from quantkit.formats.dequantize import dequantize
from quantkit.formats.inventory import expert
from quantkit.formats.quantized import examine
from quantkit.formats.registry import detect
from tests.support.helpers import edit_json, edit_tensors
from tests.support.tokenizer import VOCABULARY, byte_tokenizer

EXPERTS = 4

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
CHOSEN: dict[str, Any] = {"num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": EXPERTS, **CHOSEN}
NAMED: dict[str, Any] = {"num_experts": EXPERTS, **CHOSEN}
QWEN: dict[str, Any] = {"moe_intermediate_size": 256, **NAMED}
DIM: dict[str, Any] = {"head_dim": 32}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": EXPERTS, "moe_intermediate_size": 256, "n_shared_experts": 1,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    **CHOSEN,
}  # fmt: skip
MLA: dict[str, Any] = {
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "num_key_value_heads": 4,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 16,
    "mamba_chunk_size": 16, "layer_types": ["mamba", "attention"],
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 128,
}  # fmt: skip

MIXTURES: dict[str, dict[str, Any]] = {
    "afmoe": DIM | QWEN | {"num_shared_experts": 1, "num_dense_layers": 1},
    "aria_text": {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1},
    "dbrx": {
        "d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "ffn_config": {
            "hidden_size": 128, "ffn_hidden_size": 256, "moe_num_experts": EXPERTS, "moe_top_k": 2,
        },
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v2": MLA | DEEPSEEK,
    "deepseek_v3": MLA | DEEPSEEK,
    "dots1": DIM | DEEPSEEK,
    "ernie4_5_moe": DIM | {
        "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 256,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_interval": 1,
        "moe_layer_end_index": 1,
    },
    "flex_olmo": NAMED,
    "glm4_moe": DIM | DEEPSEEK,
    "glm4_moe_lite": MLA | DEEPSEEK,
    "gpt_oss": DIM | LOCAL,
    "granitemoe": LOCAL,
    "granitemoehybrid": LOCAL | MAMBA | {"shared_intermediate_size": 128},
    "hunyuan_v1_moe": DIM | {"num_experts": EXPERTS, "moe_topk": [2, 2]},
    "jamba": NAMED | {
        "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
        "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 16,
        "use_mamba_kernels": False,
    },
    "jetmoe": LOCAL | {"kv_channels": 32},
    "lfm2_moe": QWEN | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": DIM | LOCAL | {
        "intermediate_size_mlp": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 128,
    },
    "longcat_flash": MLA | {
        "head_dim": 32,
        "num_layers": 1, "num_hidden_layers": 2, "ffn_hidden_size": 128, "moe_topk": 2,
        "n_routed_experts": EXPERTS, "zero_expert_num": 2, "expert_ffn_hidden_size": 256,
    },
    "mimo_v2_flash": DIM | DEEPSEEK | {"v_head_dim": 32},
    "minimax": DIM | LOCAL | {
        "layer_types": ["full_attention", "linear_attention"], "block_size": 16,
    },
    "minimax_m2": DIM | LOCAL,
    "mixtral": LOCAL,
    "nemotron_h": DIM | DEEPSEEK | {
        "layers_block_type": ["mamba", "attention", "moe", "mlp"], "num_hidden_layers": 4,
        "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1, "ssm_state_size": 16,
        "chunk_size": 16, "moe_shared_expert_intermediate_size": 128,
    },
    "olmoe": NAMED,
    "phimoe": LOCAL,
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 128},
    "qwen3_moe": DIM | QWEN,
    "qwen3_next": DIM | QWEN | DELTA,
    "qwen3_5_moe_text": DIM | QWEN | DELTA,
    "solar_open": DIM | DEEPSEEK,
}  # fmt: skip
"""Family (config.json's `model_type`) → what its config has beside `BASE`. Every width that a
weight is grouped along is a multiple of 128."""


def mixture(kind: str, out: Path) -> Path:
    """Random weights in BF16 and a byte tokenizer. They are large enough for experts and routers to
    matter, and the head's four times as large, as logits of a model that knows something are."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(BASE | MIXTURES[kind]), dtype="bfloat16")
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings().weight
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "conv" not in name:
            weight.data.normal_(std=(2 if weight is head else 0.5) / weight.shape[-1] ** 0.5)
    model.save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    return out


def mxfp4(source: Path, out: Path) -> Path:
    """A GPT-OSS with random experts in MXFP4, as its makers publish it."""
    shutil.copytree(source, out)
    random = torch.Generator().manual_seed(1)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
            tensors[f"{name}_blocks"] = blocks
            scales = torch.randint(120, 123, shape, dtype=torch.uint8, generator=random)
            tensors[f"{name}_scales"] = scales

    edit_tensors(out, change)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    edit_json(out / "config.json", lambda config: config.update(quantization_config=stated))
    return out


def expand(quantized: Path, source: Path, out: Path) -> Path:
    """The dequantized weights of a checkpoint under the names of its source, in float32."""
    held, original = open_checkpoint(quantized), open_checkpoint(source)
    subject = examine(held, detect(held))
    tensors = {}
    for module, spec in subject.declaration.layers.items():
        names = {suffix: info.name for suffix, info in subject.parts[module].items()}
        parts = {suffix: held.tensor(name) for suffix, name in names.items()}
        if spec.experts:
            each = [expert(parts, spec, number) for number in range(spec.experts)]
            values = [dequantize(subject.layout.read(one, spec)) for one in each]
            tensors[module] = torch.stack(values).mT.contiguous()  # as GPT-OSS has them
        else:
            tensors[f"{module}.weight"] = dequantize(subject.layout.read(parts, spec))
    mixed = family(original.config).experts.interleaved
    for name, info in original.tensors.items():
        fused = fused_layer(name) if len(info.shape) == 3 else None
        if fused is None or f"{fused.names(0)[0]}.weight" not in tensors:
            continue
        stack = torch.stack([
            _rows([tensors.pop(f"{one}.weight") for one in fused.names(number)], mixed)
            for number in range(info.shape[0])
        ])  # fmt: skip
        tensors[name] = stack if stack.shape == info.shape else stack.mT.contiguous()
    for name in original.tensors.keys() - tensors.keys():
        tensors[name] = (held if name in held.tensors else original).tensor(name).float()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


def _rows(parts: list[torch.Tensor], mixed: bool) -> torch.Tensor:
    """The layers of an expert as the rows of one: one below the other, or in turn."""
    return torch.stack(parts, 1).flatten(0, 1) if mixed else torch.cat(parts)
