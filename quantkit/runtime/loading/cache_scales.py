"""The scales of a declared key-value cache, layer by layer; one that is not computed is refused.

Engines take a cache without any scale at 1, and so does the runtime; a layer that lacks one beside
others is refused.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from quantkit.checkpoint.network.modules import layer_index
from quantkit.errors import InputError
from quantkit.formats.base import kv_cache_scales
from quantkit.runtime.loading.source import CheckpointReader, refuse
from quantkit.runtime.network.cache_rounding import CacheScales
from quantkit.verification.configuration.activations import check_kv_cache

ELEMENTS: dict[str, Literal["fp8", "nvfp4"]] = {
    "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_cast": "fp8", "nvfp4": "nvfp4", "nvfp4_cast": "nvfp4"
}  # fmt: skip
"""Declared cache → what the runtime computes."""

_KINDS = {"k_scale": "k", "v_scale": "v", "kv_scale": "kv", "kv_cache_scale": "kv"}


def cache_scales(source: CheckpointReader, config: Any) -> dict[int, CacheScales]:
    """Decoder layer → its scales; empty without a quantized cache.

    Raises InputError: `runtime.cache` for a cache that is not computed, `runtime.cache_scale` for
    scales of single heads, and with the code of `verify` for one that is missing or no number.
    """
    subject = source.subject
    declared = "none" if subject is None else subject.declaration.kv_cache
    if subject is None or declared == "none":
        return {}
    element = ELEMENTS.get(declared)
    if element is None or getattr(config, "kv_lora_rank", None):
        what = f"a {declared} key-value cache"
        what += "" if element is None else " of latent attention"
        raise InputError(
            f"{source.checkpoint.path} declares {what}, which the runtime does not compute.",
            hint="quantkit validate DIR --engine vllm, or quantize with kv_cache=none",
            code="runtime.cache",
        )
    refuse(source.checkpoint, [f for f in check_kv_cache(subject) if f.severity == "error"])
    stored: dict[int, dict[str, float]] = {
        index: {} for index in range(int(config.num_hidden_layers))
    }
    for name in kv_cache_scales(source.names):
        kind, index = _kind(name), layer_index(name)
        if kind and index in stored:
            stored[index] |= dict.fromkeys(kind, _scale(source, name))
    return {
        index: CacheScales(found.get("k", 1.0), found.get("v", 1.0), element)
        for index, found in stored.items()
    }


def _kind(name: str) -> str:
    """Which of "k" and "v" a scale is of, or both: by its own name, or that of its projection."""
    parent, _, leaf = name.rpartition(".")
    if leaf in _KINDS:
        return _KINDS[leaf]
    return {"k_proj": "k", "v_proj": "v"}.get(parent.rpartition(".")[2], "")


def _scale(source: CheckpointReader, name: str) -> float:
    scale = source.plain(name, None, torch.float32)
    if scale.numel() != 1:
        raise InputError(
            f"{name} holds {scale.numel()} scales; the runtime computes a cache with one scale a "
            "tensor, not one a head.",
            hint="one scale a tensor for the cache, or quantkit validate DIR --engine vllm",
            code="runtime.cache_scale",
        )
    return float(scale)
