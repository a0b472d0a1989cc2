"""AWQ checkpoints (`quant_method: awq`, the GEMM layout), as AutoAWQ and AutoRound write them.

4-bit unsigned codes are packed along the output dimension in an interleaved order; zero points
likewise, and as they are. Layout: AutoAWQ, `awq/modules/linear/gemm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.schemes import scheme_for
from quantkit.engines.aliases import aliases_of
from quantkit.errors import InputError
from quantkit.formats import gptq, inventory
from quantkit.formats.base import Declaration, LayerSpec, QuantWeight, TensorSpec
from quantkit.formats.inventory import Parts
from quantkit.formats.packing import unpack_awq

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

NAME = "awq"
SIDE_FILE = "quant_config.json"
PACKING = "gemm"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether config.json says `quant_method: awq`, or only AutoAWQ's quant_config.json exists."""
    config = checkpoint.quantization_config
    if config is not None:
        return config.get("quant_method") == NAME
    return "w_bit" in checkpoint.documents.get(SIDE_FILE, {})


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`; an entry of `modules_to_not_convert` matches anywhere in a name."""
    config = checkpoint.quantization_config or checkpoint.documents[SIDE_FILE]
    packing = str(config.get("version") or config.get("format") or PACKING).lower()
    bits = config.get("bits", config.get("w_bit", 4))
    if packing != PACKING or bits != 4:
        raise InputError(
            f"AWQ version {packing!r} with {bits} bits is not supported.",
            hint=f"supported: version {PACKING} with 4 bits",
            code="format.unsupported",
        )
    found = inventory.take(checkpoint, quant_suffixes())
    entries: list[str] = list(config.get("modules_to_not_convert") or ())
    number = gptq.read_number(
        {
            "bits": bits,
            "group_size": config.get("group_size", config.get("q_group_size", 128)),
            "sym": not config.get("zero_point", True),
        }
    )

    def ignored_by(name: str) -> str | None:
        return next((entry for entry in entries if entry in name), None)

    def unpacked(_: str, parts: Parts) -> tuple[int, ...] | None:
        if "qweight" not in parts:
            return parts["weight"].shape if "weight" in parts else None
        rows, words = parts["qweight"].shape[-2:]
        return (words * 8, rows)

    def target(module: Module) -> LayerSpec | None:
        if not gptq.in_block(module, "qweight" in found.modules[module.name]):
            return None
        shape = (module.shape[0], module.shape[1])
        return LayerSpec(scheme_for(number, None), PACKING, shape)

    modules = [
        m for m in inventory.linears(found, checkpoint.config, unpacked) if len(m.shape) == 2
    ]
    layers, ignored, undeclared = inventory.sort_modules(modules, ignored_by, target)
    names = {*found.holders, *inventory.tied_names(checkpoint.config)}
    names |= aliases_of(names, checkpoint.config) if entries else set()
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        unmatched=tuple(e for e in entries if not any(e in name for name in names)),
    )


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`."""
    rows, columns = spec.shape
    groups = spec.scheme.weight.scale_shape(spec.shape)[1]
    return {
        "qweight": TensorSpec("weight", ("I32",), ((columns, rows // 8),)),
        "qzeros": TensorSpec("zero_point", ("I32",), ((groups, rows // 8),)),
        "scales": TensorSpec("scale", gptq.FLOATS, ((groups, rows),)),
        "bias": TensorSpec("bias", gptq.FLOATS, ((rows,),), False),
    }


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return frozenset({"qweight", "qzeros", "scales"})


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`; codes are unsigned."""
    return QuantWeight(
        format=spec.scheme.weight,
        q=unpack_awq(tensors["qweight"]).T.contiguous(),
        scale=tensors["scales"].T.float().contiguous(),
        zero_point=unpack_awq(tensors["qzeros"]).T.float().contiguous(),
        bias=tensors.get("bias"),
    )


def quantization_config(layers: Mapping[str, LayerSpec], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these layers, all of one number format."""
    number = next(iter(layers.values())).scheme.weight
    assert all(spec.scheme.weight == number for spec in layers.values()), "AWQ has one format"
    return {
        "bits": number.bits,
        "group_size": number.group_size or -1,
        "modules_to_not_convert": list(ignore),
        "quant_method": NAME,
        "version": PACKING,
        "zero_point": not number.symmetric,
    }
