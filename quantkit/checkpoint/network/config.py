"""What a model's config.json says of its network, families' defaults included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: itself, or nested in a multi-modal one."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, dict) and "hidden_size" in nested:
            return nested
    thinker = config.get("thinker_config")
    if isinstance(thinker, dict):
        return text_config(thinker)
    return config


_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
    },
    "glm4": {"head_dim": 128},
    "gpt_oss": {"head_dim": 64},
    "qwen3": {"head_dim": 128},
    "qwen3_vl_text": {"head_dim": 128},
    "qwen3_vl_moe_text": {"head_dim": 128},
}  # fmt: skip
"""Sizes that a config.json may leave to Transformers' config class, by the language model's type;
not those that follow from others (head_dim from the hidden size)."""


_TIED = (
    "biogpt", "bloom", "cohere", "cohere2", "cohere2_moe", "ctrl", "ernie4_5", "ernie4_5_moe",
    "falcon", "falcon_mamba", "gpt2", "gpt_bigcode", "gpt_neo", "jetmoe", "lfm2", "lfm2_moe",
    "mamba", "minicpm3", "mpt", "openai-gpt", "opt", "recurrent_gemma", "smollm3", "starcoder2",
    "vaultgemma", "xglm", "youtu", "zamba", "zamba2", "zaya",
)  # fmt: skip
"""Families, Gemma's aside, whose config class ties the output head to the embedding where
config.json is silent (Transformers 5.17)."""


def text_size(config: Mapping[str, Any], key: str) -> int:
    """A size of the language model: as config.json states it, else its family's default, else 0."""
    text = text_config(config)
    kind = str(text.get("model_type") or f"{config.get('model_type')}_text")
    return _integer(text[key]) if key in text else _DEFAULTS.get(kind, {}).get(key, 0)


def positions(config: Mapping[str, Any]) -> int | None:
    """The longest text that a network can be given, None where its config does not say."""
    inner = text_config(config)
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    stated = [inner[key] for key in keys if isinstance(inner.get(key), int) and inner[key] > 0]
    return stated[0] if stated else None


def expert_count(config: Mapping[str, Any]) -> int:
    """Routed experts a layer, 0 for a dense model (Doge says so by `is_moe`)."""
    text = text_config(config)
    if text.get("is_moe") is False:
        return 0
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head shares the embedding's weight.

    The outermost statement counts; for configs that are silent, the default of their family.
    """
    for level in (config, text_config(config)):
        if isinstance(level.get("tie_word_embeddings"), bool):
            return bool(level["tie_word_embeddings"])
    kind = str(text_config(config).get("model_type", ""))
    return kind.startswith("gemma") or kind in _TIED


def missing_head(config: Mapping[str, Any], has_head: bool) -> str | None:
    """What to say of a causal language model that has no output head, and does not say that the
    embedding is one; None for others."""
    stated = "tie_word_embeddings" in config or "tie_word_embeddings" in text_config(config)
    generates = "ForCausalLM" in str(config.get("architectures") or "")
    if has_head or stated or not generates or is_tied(config):
        return None
    return (
        "no tensor is an output head, and config.json does not say that the embedding is one "
        "(tie_word_embeddings): engines may start with a random head; state it, true or false"
    )


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0
