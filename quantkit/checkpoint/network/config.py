"""What a model's config.json says of its network, families' defaults included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json


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


def stop_tokens(directory: Path, config: Mapping[str, Any]) -> list[int]:
    """End-of-text ids: those of the directory's generation_config.json, else of `config`."""
    file = directory / "generation_config.json"
    stated = read_json(file).get("eos_token_id") if file.is_file() else None
    found = config.get("eos_token_id") if stated is None else stated
    every = found if isinstance(found, list) else [found]
    return [token for token in every if token is not None]


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

    The outermost statement counts; Transformers' default is True for configs that are silent in
    families that tie (Gemma), and False for the others.
    """
    for level in (config, text_config(config)):
        if isinstance(level.get("tie_word_embeddings"), bool):
            return bool(level["tie_word_embeddings"])
    return str(text_config(config).get("model_type", "")).startswith("gemma")


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0
