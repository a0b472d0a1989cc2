"""The shape of a tensor from its name and the config's sizes: the rules of the families.

Transformers' model classes are the source of every rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.network.expert_layout import input_first
from quantkit.checkpoint.network.families import tower_names
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.modules import in_tower
from quantkit.checkpoint.network.sizes import Sizes


def derived_shape(name: str, config: Mapping[str, Any], size: Sizes) -> tuple[int, ...]:
    """The shape of the tensor `name` of a 16-bit checkpoint; (hidden,) for what no rule knows.

    Towers get the vision config's sizes, as far as it has them.
    """
    module, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        module = name
    leaf = module.rpartition(".")[2]
    tower = in_tower(name, tower_names(config))
    rows = _tower(leaf, module, config) if tower else _text(leaf, module, config, size)
    if rows is None or suffix == "bias":
        return (rows[-2] if rows is not None and len(rows) > 1 else size.hidden,)
    return rows


def _text(leaf: str, module: str, config: Mapping[str, Any], size: Sizes) -> tuple[int, ...] | None:
    if leaf in ("gate_up_proj", "down_proj") and ".experts." in module + ".":
        fused = _fused_experts(leaf, config, size) if module.endswith(f"experts.{leaf}") else None
        if fused is not None:
            return fused
    if leaf in ("gate_up_proj_bias", "down_proj_bias"):
        outputs = size.hidden if leaf == "down_proj_bias" else 2 * size.expert_inner
        return (size.experts, outputs)
    attention = _attention(leaf, size)
    if attention is not None:
        return attention
    inner = _inner(module, size)
    table: dict[str, tuple[int, ...]] = {
        "embed_tokens": (size.vocabulary, size.hidden),
        "lm_head": (size.vocabulary, size.hidden),
        "wte": (size.vocabulary, size.hidden),
        "gate_proj": (inner, size.hidden),
        "up_proj": (inner, size.hidden),
        "w1": (inner, size.hidden),
        "w3": (inner, size.hidden),
        "down_proj": (size.hidden, inner),
        "w2": (size.hidden, inner),
        "gate_up_proj": (2 * inner, size.hidden),
        "gate": (size.experts, size.hidden),
        "router": (size.experts, size.hidden),
        "shared_expert_gate": (1, size.hidden),
        "e_score_correction_bias": (size.experts,),
        "eh_proj": (size.hidden, 2 * size.hidden),
        "fc1": (size.inner, size.hidden),
        "fc2": (size.hidden, size.inner),
    }
    return table.get(leaf)


def _attention(leaf: str, size: Sizes) -> tuple[int, ...] | None:
    if size.latent_rank:
        query = (size.heads * (size.nope + size.rope), size.query_rank or size.hidden)
        latent: dict[str, tuple[int, ...]] = {
            "q_a_proj": (size.query_rank, size.hidden),
            "q_b_proj": query,
            "q_proj": query,
            "kv_a_proj_with_mqa": (size.latent_rank + size.rope, size.hidden),
            "kv_b_proj": (size.heads * (size.nope + size.value), size.latent_rank),
            "o_proj": (size.hidden, size.heads * size.value),
            "q_a_layernorm": (size.query_rank,),
            "kv_a_layernorm": (size.latent_rank,),
        }
        return latent.get(leaf)
    wide, narrow = size.heads * size.head, size.shared_heads * size.head
    both = 2 * size.linear_key + size.linear_value
    table: dict[str, tuple[int, ...]] = {
        "q_proj": (wide * (2 if size.gated else 1), size.hidden),
        "k_proj": (narrow, size.hidden),
        "v_proj": (narrow, size.hidden),
        "o_proj": (size.hidden, wide),
        "dense": (size.hidden, wide),
        "qkv_proj": (wide + 2 * narrow, size.hidden),
        "q_norm": (size.head,),
        "k_norm": (size.head,),
        "sinks": (size.heads,),
        "in_proj_qkv": (both, size.hidden),
        "in_proj_z": (size.linear_value, size.hidden),
        "in_proj_qkvz": (both + size.linear_value, size.hidden),
        "in_proj_a": (size.linear_value_heads, size.hidden),
        "in_proj_b": (size.linear_value_heads, size.hidden),
        "in_proj_ba": (2 * size.linear_value_heads, size.hidden),
        "out_proj": (size.hidden, size.linear_value),
    }
    return table.get(leaf)


def _fused_experts(leaf: str, config: Mapping[str, Any], size: Sizes) -> tuple[int, ...]:
    rows, columns = 2 * size.expert_inner, size.hidden
    if leaf == "down_proj":
        rows, columns = size.hidden, size.expert_inner
    # No shape is known here: the family alone tells, and Transformers' classes hold [out, in].
    swapped = input_first({}, config, leaf)
    return (size.experts, columns, rows) if swapped else (size.experts, rows, columns)


def _inner(module: str, size: Sizes) -> int:
    if ".experts." in module:
        return size.expert_inner
    return size.shared_inner if ".shared_expert" in module else size.inner


def _tower(leaf: str, module: str, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    vision = config.get("vision_config") or (config.get("thinker_config") or {}).get(
        "vision_config"
    )
    stated: Mapping[str, Any] = vision if isinstance(vision, dict) else {}
    text = text_config(config)
    # Qwen2-VL calls the tower's width embed_dim and the language model's hidden_size.
    hidden = int(stated.get("embed_dim") or stated.get("hidden_size") or 0)
    inner = int(stated.get("intermediate_size") or hidden * stated.get("mlp_ratio", 4))
    merge = int(stated.get("spatial_merge_size", 1)) ** 2
    table: dict[str, tuple[int, ...]] = {
        "qkv": (3 * hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "fc1": (inner, hidden),
        "linear_fc1": (inner, hidden),
        "fc2": (hidden, inner),
        "linear_fc2": (hidden, inner),
    }
    if "norm" in leaf or leaf.startswith("ln"):
        return (hidden,)
    if "merger" in module:
        last = int(text.get("hidden_size", hidden))
        return (last if leaf.endswith(("2", "fc2")) else merge * hidden, merge * hidden)
    if "multi_modal_projector" in module:
        return (int(text.get("hidden_size", hidden)), hidden)
    square: tuple[int, ...] = (hidden, hidden)
    return table.get(leaf, square)
