"""What is known of each model family: `family(config)` looks it up, one module a kinship."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.network.families import (
    conv1d,
    deepseek,
    gemma,
    glm,
    gpt_oss,
    llama,
    mixtral,
    others,
    phi,
    qwen,
    vision,
)
from quantkit.checkpoint.network.families.base import Experts, Family
from quantkit.checkpoint.network.language import text_config

__all__ = ["FAMILIES", "Experts", "Family", "family", "family_of", "tower_names"]

_MODULES = (conv1d, deepseek, gemma, glm, gpt_oss, llama, mixtral, others, phi, qwen, vision)
FAMILIES: tuple[Family, ...] = tuple(found for module in _MODULES for found in module.FAMILIES)
_BY_TYPE = {kind: found for found in FAMILIES for kind in found.types}
_DEFAULT = Family()


def family_of(model_type: object) -> Family:
    """The family of a `model_type`; the default one, not `known`, where there is none."""
    return _BY_TYPE.get(str(model_type), _DEFAULT)


def family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json's language model, else of the config around it."""
    inner = family_of(text_config(config).get("model_type"))
    return inner if inner.known else family_of(config.get("model_type"))


def tower_names(config: Mapping[str, Any]) -> frozenset[str]:
    """What this model's family, and that of its language model, call a tower or projector."""
    own = family_of(config.get("model_type")).towers
    return own | family_of(text_config(config).get("model_type")).towers
