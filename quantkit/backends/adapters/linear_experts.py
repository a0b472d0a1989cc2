"""LLM Compressor's experts: modules of their own while it works, the checkpoint's names on disk."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers.core_model_loading import WeightConverter, WeightRenaming

from quantkit.backends.adapters.places import HALVES, Place, renamed_modules, separated
from quantkit.backends.process.job import JobInputError


def separate_experts(
    model: Any, found: Mapping[str, Place], *, rename: bool
) -> dict[str, list[str]]:
    """Make every expert a module of linear layers; layer of the plan → its layers in the model.

    With `rename`, they are saved as the checkpoint calls them (`w1`, not `gate_proj`). Raises
    JobInputError for experts that the library does not take apart.
    """
    apart = separated(model, found)
    with _text_part(model.config):
        linearize_moe(model)
    if rename:
        model._weight_conversions = _with_names(getattr(model, "_weight_conversions", None) or [])
    for place in found.values():
        block = model.get_submodule(place.module)
        if place.parameter and not isinstance(block, LinearExperts2D):
            raise JobInputError(
                f"LLM Compressor does not take apart the experts of {place.module} "
                f"({type(block).__name__}).",
                hint="keep them in 16 bit: --set ignore+=@experts",
                code="llmcompressor.experts",
            )
    return {layer: list(names) for layer, names in apart.items()}


@contextmanager
def _text_part(config: Any) -> Iterator[None]:
    """The config of a text model as its own text part, where the library reads the sizes of Llama
    4's experts."""
    if hasattr(config, "text_config"):
        yield
        return
    config.text_config = config
    try:
        yield
    finally:
        del config.text_config


def checkpoint_names(found: Mapping[str, Place]) -> dict[str, str]:
    """Linear layer of the model → its name in the checkpoint, where they differ."""
    single = {f"{p.module}.{p.expert}.{p.part}": name for name, p in found.items() if p.part}
    return renamed_modules(found) | single


def _with_names(conversions: Iterable[Any]) -> list[Any]:
    """The conversions with a renaming of each expert's layers in place of their fusion."""
    result: list[Any] = []
    for conversion in conversions:
        target = str(conversion.target_patterns[0]).rpartition(".")[2]
        patterns = [str(pattern) for pattern in conversion.source_patterns]
        inside = [re.fullmatch(r".*experts\.\*\.(\w+)\.weight", pattern) for pattern in patterns]
        if not isinstance(conversion, WeightConverter) or not all(inside):
            result.append(conversion)
            continue
        parts = HALVES if target == "gate_up_proj" else (target,)
        for name, part in zip((found.group(1) for found in inside if found), parts, strict=True):
            if name != part:
                result.append(
                    WeightRenaming(
                        source_patterns=rf"\.experts\.(\d+)\.{name}\.",
                        target_patterns=rf".experts.\1.{part}.",
                    )
                )
    return result


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear layer of the model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def others(model: torch.nn.Module, planned: Collection[str]) -> list[str]:
    """Linear layers of the model that are not planned."""
    return [name for name in linear_layers(model) if name not in planned]
