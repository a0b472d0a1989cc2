"""Tiny random mixtures of experts of many families, with a tokenizer that their vocabulary fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 260
EXPERTS = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
_WIDTH = {"moe_intermediate_size": 128}
_NAMED = {"num_experts": EXPERTS, **_WIDTH}
_ROUTED = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, **_WIDTH,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}  # fmt: skip
_HEADS = {"head_dim": 32}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 128,
}  # fmt: skip
_STATES = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**_NAMED, **_HEADS, "num_shared_experts": 1, "num_dense_layers": 1},
    "deepseek_v2": {**_ROUTED, **_LATENT},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "dots1": {**_ROUTED, **_HEADS},
    "ernie4_5_moe": {
        **_HEADS, **_WIDTH, "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1,
    },
    "flex_olmo": {"num_experts": EXPERTS},
    "glm4_moe": {**_ROUTED, **_HEADS},
    "glm4_moe_lite": {**_ROUTED, **_LATENT},
    "gpt_oss": {**_HEADS, "num_local_experts": EXPERTS, "layer_types": ["full_attention"] * 2},
    "hunyuan_v1_moe": {**_HEADS, "num_experts": EXPERTS, "moe_topk": [2, 2]},
    "jamba": {
        **_STATES, "num_experts": EXPERTS, "expert_layer_period": 2, "expert_layer_offset": 1,
        "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
    },
    "lfm2_moe": {**_NAMED, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {
        **_HEADS, "num_local_experts": EXPERTS, "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1, "attention_chunk_size": 128,
    },
    "longcat_flash": {
        **_LATENT, **_HEADS, "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 128,
        "n_routed_experts": EXPERTS, "zero_expert_num": 2, "moe_topk": 2,
        "expert_ffn_hidden_size": 128,
    },
    "mimo_v2_flash": {**_ROUTED, "head_dim": 64, "v_head_dim": 64},
    "minimax": {
        **_HEADS, "num_local_experts": EXPERTS, "block_size": 32,
        "layer_types": ["full_attention", "linear_attention"],
    },
    "minimax_m2": {**_HEADS, "num_local_experts": EXPERTS},
    "mixtral": {"num_local_experts": EXPERTS},
    "nemotron_h": {
        **_HEADS, **_ROUTED, "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1,
        "ssm_state_size": 16, "chunk_size": 32, "moe_shared_expert_intermediate_size": 128,
    },
    "olmoe": {"num_experts": EXPERTS},
    "phimoe": {"num_local_experts": EXPERTS},
    "qwen2_moe": {**_NAMED, "shared_expert_intermediate_size": 128},
    "qwen3_5_moe_text": {**_NAMED, **_HEADS, **_LINEAR},
    "qwen3_moe": {**_NAMED, **_HEADS},
    "qwen3_next": {**_NAMED, **_HEADS, **_LINEAR},
    "solar_open": {**_ROUTED, **_HEADS},
}  # fmt: skip


def mixture(family: str, out: Path) -> Path:
    """A model of that family with random weights, saved by Transformers, and a byte tokenizer."""
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family]})
    make: Any = hf.AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.float().std():  # left to whoever loads weights
                parameter.normal_(0, 0.02)
    model.save_pretrained(out)
    _tokenizer().save_pretrained(out)
    return out


def _tokenizer() -> Any:
    """One token a byte."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {
        word: number
        for number, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = hf.PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=256,
    )  # fmt: skip
