"""What a model's config.json says of its network, families' defaults included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
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


def stop_tokens(directory: Path, config: Mapping[str, Any]) -> list[int]:
    """End-of-text ids: those of the directory's generation_config.json, else of `config`."""
    file = directory / "generation_config.json"
    stated = read_json(file).get("eos_token_id") if file.is_file() else None
    found = config.get("eos_token_id") if stated is None else stated
    every = found if isinstance(found, list) else [found]
    return [token for token in every if token is not None]


def expert_count(config: Mapping[str, Any]) -> int:
    """Routed experts a layer, 0 for a dense model (Doge says so by `is_moe`)."""
    text = _with_nested(text_config(config))
    if text.get("is_moe") is False:
        return 0
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def experts_per_token(config: Mapping[str, Any]) -> int:
    """Routed experts that compute a token, 0 for a dense model; 1 where a mixture does not say."""
    if not expert_count(config):
        return 0
    text = _with_nested(text_config(config))
    keys = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
    stated = next((text[key] for key in keys if text.get(key)), 1)
    return max(map(_integer, stated)) if isinstance(stated, list) else _integer(stated)


def _with_nested(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the keys that DBRX states in an object of their own."""
    nested = text.get("ffn_config")
    return {**nested, **text} if isinstance(nested, dict) else text


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head shares the embedding's weight.

    The outermost statement counts, then what Transformers' class of the family has.
    """
    for level in (config, text_config(config)):
        if isinstance(level.get("tie_word_embeddings"), bool):
            return bool(level["tie_word_embeddings"])
    return family(config).tied


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
