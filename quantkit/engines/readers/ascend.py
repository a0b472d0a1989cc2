"""Ascend: the type that `quant_model_description.json` gives every tensor."""

from __future__ import annotations

from quantkit.engines.loadable import Loadable
from quantkit.engines.names import EngineLayer
from quantkit.engines.readers.base import (
    ALWAYS_SPLIT,
    MIXED,
    NOT,
    Reading,
    SettingsReader,
)


def _expert_names(layer: EngineLayer) -> list[str]:
    """The first expert's layers by their names in the file, where these are one by one."""
    leaves = dict.fromkeys(part.name.rpartition(".")[2] for part in layer.parts)
    if not leaves.keys().isdisjoint(("gate_up_proj", "input_linear")):
        leaves = dict.fromkeys(("gate_proj", "up_proj", "down_proj"))
    return [f"{layer.name}.0.{leaf}" for leaf in leaves]


def ascend(candidate: Loadable) -> SettingsReader:
    """By type of a layer's weight, of all its members where it is merged; FLOAT is 16 bit."""
    types = candidate.settings
    every = {**ALWAYS_SPLIT, "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa")}

    def kind(name: str) -> str:
        short = name.removeprefix("language_model.")
        found = types.get(f"{name}.weight", types.get(f"{short}.weight"))
        return str(found or types.get(f"language_model.{name}.weight", ""))

    def read(layer: EngineLayer) -> Reading:
        if layer.head:
            return NOT
        names: tuple[str, ...] = (layer.name,)
        if layer.experts:
            names = tuple(_expert_names(layer))
        elif layer.leaf in every and len(layer.parts) > 1:
            parent = layer.name[: -len(layer.leaf)]
            names = tuple(f"{parent}{leaf}" for leaf in every[layer.leaf])
        kinds = {kind(name) for name in names}
        if len(kinds) > 1:
            return MIXED
        only = kinds.pop()
        return NOT if only in ("", "FLOAT") else Reading(True, only)

    return read
