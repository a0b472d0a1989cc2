"""Which part of a config.json is the language model's."""

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
