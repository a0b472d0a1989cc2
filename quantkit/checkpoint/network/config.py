"""What a model's config.json says of its network, families' defaults included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.language import text_config


def text_size(config: Mapping[str, Any], key: str) -> int:
    """A size of the language model: as config.json states it, else its family's default, else 0."""
    text = text_config(config)
    return _integer(text[key]) if key in text else family(config).sizes.get(key, 0)


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

    The outermost statement counts, then what Transformers' class of the family has.
    """
    for level in (config, text_config(config)):
        if isinstance(level.get("tie_word_embeddings"), bool):
            return bool(level["tie_word_embeddings"])
    return family(config).tied


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0
