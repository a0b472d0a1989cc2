"""GPT-OSS's MXFP4 experts (`quant_method: mxfp4`): `*_blocks`, `*_scales` and `*_bias`.

Each fused tensor of experts is [experts, out, in / 32, 16] bytes, two E2M1 codes a byte with the
even column in the low nibble, and one E8M0 exponent for 32 columns. Rows of `gate_up_proj`
alternate: gate 0, up 0, gate 1, …. All other layers are in 16 bit. Source: Transformers 5.17,
`integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.formats import inventory
from quantkit.formats.base import Declaration, LayerSpec, QuantWeight, TensorSpec
from quantkit.formats.dequantize import decode_e8m0
from quantkit.formats.inventory import Matcher, Parts, not_converted
from quantkit.formats.packing import unpack_nibbles

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

NAME = "mxfp4"
PACKING = "blocks"
_GROUP = 32


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether config.json says `quant_method: mxfp4`."""
    return (checkpoint.quantization_config or {}).get("quant_method") == NAME


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`; experts are declared, everything else is 16 bit by silence."""
    settings = checkpoint.quantization_config or {}
    found = inventory.take(checkpoint, quant_suffixes())
    entries = settings.get("modules_to_not_convert") or ()
    exclude = Matcher([not_converted(entry) for entry in entries])

    def unpacked(_: str, parts: Parts) -> tuple[int, ...] | None:
        stored = parts.get("blocks") or parts.get("scales")
        if stored is not None and len(stored.shape) >= 3:
            return (*stored.shape[:2], stored.shape[2] * _GROUP)
        return parts["weight"].shape if "weight" in parts else None

    def target(module: Module) -> LayerSpec | None:
        if module.kind != "experts":
            return None
        experts, rows, columns = module.shape
        return LayerSpec(SCHEMES["mxfp4a16"], PACKING, (rows, columns), experts)

    modules = inventory.linears(found, checkpoint.config, unpacked)
    layers, ignored, undeclared = inventory.sort_modules(modules, exclude.entry, target)
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        unmatched=exclude.unmatched(found, checkpoint.config),
    )


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`; GPT-OSS's experts all have a bias."""
    rows, columns = spec.shape
    groups = (spec.experts, rows, columns // _GROUP)
    floats = ("F32", "BF16", "F16")
    return {
        "blocks": TensorSpec("weight", ("U8",), ((*groups, _GROUP // 2),)),
        "scales": TensorSpec("scale_e8m0", ("U8", "F8_E8M0"), (groups,)),
        "bias": TensorSpec("bias", floats, ((spec.experts, rows),)),
    }


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return frozenset({"blocks", "scales"})


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`; of one expert."""
    return QuantWeight(
        format=spec.scheme.weight,
        q=unpack_nibbles(tensors["blocks"].flatten(-2)),
        scale=decode_e8m0(tensors["scales"]),
        bias=tensors.get("bias"),
    )
