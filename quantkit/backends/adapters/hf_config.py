"""A config of Transformers: which class loads its model, and what it says of the language model."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """The Auto class of a Transformers config: of models that take more than text where the config
    has a language model inside, else of causal language models."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    nested = config.get_text_config() is not config
    known = type(config) in AutoModelForMultimodalLM._model_mapping
    return AutoModelForMultimodalLM if nested and known and not own_code else AutoModelForCausalLM


def stated_value(config: Any, key: str) -> Any:
    """A value of a Transformers config, or of the language model's in it; None where none is."""
    levels = (config, config.get_text_config())
    return next((v for v in (getattr(level, key, None) for level in levels) if v is not None), None)
