"""A finished checkpoint as the engines' rules look at it."""

from __future__ import annotations

from typing import Any

from quantkit.checkpoint.network.expert_layout import upright
from quantkit.checkpoint.network.modules import linear_modules
from quantkit.engines import LayerPart, Loadable
from quantkit.formats import ascend, awq, gptq, modelopt
from quantkit.formats.base import kv_cache_scales
from quantkit.formats.quantized import QuantizedCheckpoint

_SIDE_FILES = {
    "modelopt": modelopt.SIDE_FILE,
    "gptq": gptq.SIDE_FILE,
    "awq": awq.SIDE_FILE,
    "ascend": ascend.SIDE_FILE,
}


def candidate(subject: QuantizedCheckpoint) -> Loadable:
    """What the engines' rules look at: the settings, and what the tensors hold by their headers."""
    checkpoint, declared = subject.checkpoint, subject.declaration
    layout = declared.quant_method
    settings: dict[str, Any] = checkpoint.quantization_config or {}
    if layout == "ascend" or not settings:
        settings = checkpoint.documents.get(_SIDE_FILES.get(layout, ""), {})
    parts = {}
    for module in linear_modules(subject.modules.values()):
        spec = None if subject.is_float(module.name) else declared.layers.get(module.name)
        shape = upright(module.tensor, module.shape, checkpoint)
        if spec is not None:
            shape = (spec.experts, *spec.shape) if spec.experts else spec.shape
        parts[module.name] = LayerPart(
            module.name,
            module.kind,
            shape,
            spec.scheme if spec else None,
            spec.packing if spec else "",
        )
    scales = kv_cache_scales(checkpoint.tensors) if declared.kv_cache != "none" else ()
    return Loadable(checkpoint.config, layout, settings, parts, declared.kv_cache, scales)
