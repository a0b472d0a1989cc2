"""The sizes that a config.json states, under the names that its families use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.checkpoint.network.config import expert_count, text_size
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.language import text_config


@dataclass(frozen=True)
class Sizes:
    """Of the language model; 0 where the config has none.

    nope, rope, value: per head of latent attention (MLA), the parts without and with rotary
    embedding and the value's; linear_key, linear_value: whole widths of linear attention.
    """

    hidden: int
    inner: int
    vocabulary: int
    layers: int
    heads: int
    shared_heads: int
    head: int
    experts: int
    expert_inner: int
    shared_inner: int
    query_rank: int
    latent_rank: int
    nope: int
    rope: int
    value: int
    linear_key: int
    linear_value: int
    linear_value_heads: int
    gated: bool
    """Whether q_proj holds an output gate beside the query."""


def sizes(config: Mapping[str, Any]) -> Sizes:
    """Read from the language model's part of config.json, or its family's defaults."""
    text = text_config(config)

    def number(*keys: str, default: int = 0) -> int:
        return next((v for k in keys if (v := text_size(config, k))), default)

    hidden, heads = number("hidden_size", "n_embd"), number("num_attention_heads", "n_head")
    inner = number("intermediate_size", "n_inner")
    expert_inner = number("moe_intermediate_size", default=inner)
    shared = number("n_shared_experts") * expert_inner
    return Sizes(
        hidden=hidden,
        inner=number("intermediate_size_mlp", default=inner),
        vocabulary=number("vocab_size"),
        layers=number("num_hidden_layers", "n_layer"),
        heads=heads,
        shared_heads=number("num_key_value_heads", default=heads),
        head=number("head_dim", default=hidden // heads if heads else 0),
        experts=expert_count(config),
        expert_inner=expert_inner,
        shared_inner=number("shared_expert_intermediate_size", default=shared or inner),
        query_rank=number("q_lora_rank"),
        latent_rank=number("kv_lora_rank"),
        nope=number("qk_nope_head_dim"),
        rope=number("qk_rope_head_dim"),
        value=number("v_head_dim"),
        linear_key=number("linear_num_key_heads") * number("linear_key_head_dim"),
        linear_value=number("linear_num_value_heads") * number("linear_value_head_dim"),
        linear_value_heads=number("linear_num_value_heads"),
        gated=family(config).gated_queries or bool(text.get("attn_output_gate")),
    )
