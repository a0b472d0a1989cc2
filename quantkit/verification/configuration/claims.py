"""What the configuration claims of a layer's values, and engines that trust it would misread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.directory import Checkpoint
from quantkit.formats.base import LayerSpec, QuantWeight
from quantkit.formats.gptq import SIDE_FILE
from quantkit.formats.quantized import QuantizedCheckpoint
from quantkit.verification.findings import Finding, error


def check_claims(
    subject: QuantizedCheckpoint, module: str, weight: QuantWeight, spec: LayerSpec
) -> list[Finding]:
    """GPTQ's `desc_act` and AWQ's `zero_point`, where they are false, against the tensors."""
    method = subject.declaration.quant_method
    if method == "gptq" and weight.g_idx is not None and _claims_order(subject.checkpoint):
        return [
            error(
                "format.contradiction",
                f"{module}.g_idx is not 0 … 0, 1 … 1, … and the config says desc_act false; "
                "engines that trust it ignore g_idx and scale the wrong columns",
                "set desc_act true, or export the checkpoint again",
                module,
            )
        ]
    if method == "awq" and weight.zero_point is not None and spec.scheme.weight.symmetric:
        middle = 2.0 ** (spec.scheme.weight.bits - 1)
        others = weight.zero_point != middle
        if bool(others.any()):
            return [
                error(
                    "format.contradiction",
                    f"{module}.qzeros holds {int(others.sum())} zero points other than "
                    f"{middle:g} (such as {float(weight.zero_point[others][0]):g}) and the config "
                    f"says zero_point false; engines that trust it use {middle:g}",
                    "set zero_point true, or export the checkpoint again",
                    module,
                )
            ]
    return []


def _claims_order(checkpoint: Checkpoint) -> bool:
    """Whether the config says for every layer that columns were quantized in their order."""
    config: Mapping[str, Any] = (
        checkpoint.quantization_config or checkpoint.documents.get(SIDE_FILE) or {}
    )
    rules = (config.get("dynamic") or {}).values()
    return config.get("desc_act") is False and not any("desc_act" in rule for rule in rules)
