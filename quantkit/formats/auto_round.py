"""AutoRound's own configuration (`quant_method: auto-round`) over the layouts of other tools.

`packing_format` says which: GPTQ (with or without the zero points' offset of one), AWQ, or the
FP4, MX and FP8 layouts of compressed-tensors. Layers of `block_name_to_quantize` are quantized
with the top-level settings, `extra_config` overrides them by name or regular expression (16 bits:
left alone). Layout: auto-round 0.15, `export/export_to_autoround`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.network.patterns import compiled
from quantkit.checkpoint.schemes import NumberFormat, scheme_for
from quantkit.engines.aliases import aliases_of
from quantkit.errors import InputError
from quantkit.formats import awq, compressed_tensors, gptq, inventory
from quantkit.formats.base import Declaration, Format, LayerSpec, Problem, QuantWeight, TensorSpec
from quantkit.formats.inventory import Parts

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

NAME = "auto-round"

_INTEGER_PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "gemm",
    "auto_round:awq": "gemm",
}
_FLOAT_PACKINGS = {
    ("nv_fp", 4): "nvfp4-pack-quantized",
    ("mx_fp", 4): "mxfp4-pack-quantized",
    ("mx_fp", 8): "mxfp8-quantized",
    ("fp", 8): "float-quantized",
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether config.json says `quant_method: auto-round`."""
    method = (checkpoint.quantization_config or {}).get("quant_method")
    return method in (NAME, "auto_round", "intel/auto-round")


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`."""
    config = checkpoint.quantization_config or {}
    found = inventory.take(checkpoint, quant_suffixes())
    extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config") or {}
    blocks = _blocks(config.get("block_name_to_quantize") or config.get("to_quant_block_names"))

    patterns = [(entry, compiled(entry, entry)) for entry in extra if _is_regex(entry)]

    def entry_of(name: str) -> str | None:
        if name in extra:
            return name
        return next((entry for entry, pattern in patterns if pattern.search(name)), None)

    def settings(name: str) -> Mapping[str, Any]:
        entry = entry_of(name)
        return {**config, **(extra[entry] if entry is not None else {})}

    def ignored_by(name: str) -> str | None:
        return entry_of(name) if int(settings(name).get("bits", 4)) >= 16 else None

    def unpacked(name: str, parts: Parts) -> tuple[int, ...] | None:
        return _unpacked(settings(name), parts)

    def target(module: Module) -> LayerSpec | None:
        named = module.name in extra
        stored = not quant_suffixes().isdisjoint(found.modules[module.name])
        inside = not blocks or any(module.name.startswith(f"{block}.") for block in blocks)
        if not named and not (inside and gptq.in_block(module, stored)):
            return None
        chosen = settings(module.name)
        scheme = scheme_for(*_numbers(chosen))
        return LayerSpec(scheme, _packing(chosen), (module.shape[0], module.shape[1]))

    modules = [
        m for m in inventory.linears(found, checkpoint.config, unpacked) if len(m.shape) == 2
    ]
    layers, ignored, undeclared = inventory.sort_modules(modules, ignored_by, target)
    names = {*found.holders, *inventory.tied_names(checkpoint.config)}
    names |= aliases_of(names, checkpoint.config) if extra else set()
    absent = [entry for entry in extra if not _is_regex(entry) and entry not in names]
    kept = {entry for entry in absent if int(extra[entry].get("bits", 4)) >= 16}
    problems = [
        Problem(
            "format.layer_missing",
            f"extra_config names {entry!r} and the checkpoint has no such module",
            "correct the name in config.json, or export the model again",
        )
        for entry in absent
        if entry not in kept
    ]
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        unmatched=tuple(entry for entry in absent if entry in kept),
        problems=tuple(problems),
    )


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`."""
    return _layout(spec.packing).expected(spec)


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return gptq.quant_suffixes() | awq.quant_suffixes() | compressed_tensors.quant_suffixes()


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`."""
    return _layout(spec.packing).read(tensors, spec)


def _layout(packing: str) -> Format:
    modules: dict[str, ModuleType] = {"gptq": gptq, "gptq_v2": gptq, "gemm": awq}
    return cast(Format, modules.get(packing, compressed_tensors))


def _packing(settings: Mapping[str, Any]) -> str:
    kind, bits = _kind(settings), int(settings.get("bits", 4))
    stated = str(settings.get("packing_format") or "auto_round:auto_gptq")
    packing = (
        _INTEGER_PACKINGS.get(stated) if kind == "int" else _FLOAT_PACKINGS.get((kind, bits))
    )  # fmt: skip
    if packing is None:
        raise InputError(
            f"AutoRound packing_format {stated!r} with {bits}-bit {kind!r} is not supported.",
            hint=f"supported: {', '.join(_INTEGER_PACKINGS)}, and NVFP4, MXFP4, MXFP8, FP8",
            code="format.unsupported",
        )
    return packing


def _numbers(settings: Mapping[str, Any]) -> tuple[NumberFormat, NumberFormat | None]:
    """The number formats of weights and activations."""
    weight = _number(settings, "")
    bits = settings.get("act_bits") or 16
    return weight, _number(settings, "act_") if int(bits) < 16 else None


def _number(settings: Mapping[str, Any], prefix: str) -> NumberFormat:
    kind = _kind(settings, prefix)
    dynamic = bool(prefix) and bool(settings.get("act_dynamic", True))
    size = int(settings.get(f"{prefix}group_size") or 0)
    if kind == "nv_fp":
        return NumberFormat("fp4_e2m1", "group", size or 16, dynamic=dynamic, scale="e4m3")
    if kind == "mx_fp":
        four = int(settings.get(f"{prefix}bits", 4)) == 4
        element = "fp4_e2m1" if four else "fp8_e4m3"
        return NumberFormat(element, "group", size or 32, dynamic=dynamic, scale="e8m0")  # type: ignore[arg-type]
    row = "token" if prefix else "channel"
    granularity = "tensor" if size == 0 else row
    if kind == "fp":
        return NumberFormat("fp8_e4m3", granularity, dynamic=dynamic)  # type: ignore[arg-type]
    if prefix:
        return NumberFormat("int8", granularity, dynamic=dynamic)  # type: ignore[arg-type]
    return gptq.read_number(settings)


def _kind(settings: Mapping[str, Any], prefix: str = "") -> str:
    stated = str(settings.get(f"{prefix}data_type") or settings.get("data_type") or "int")
    return next((kind for kind in ("nv_fp", "mx_fp", "fp") if stated.startswith(kind)), "int")


def _unpacked(settings: Mapping[str, Any], parts: Parts) -> tuple[int, ...] | None:
    if "qweight" in parts:
        first, second = parts["qweight"].shape[-2:]
        if _packing(settings) == "gemm":
            return (second * 8, first)
        return (second, first * 32 // int(settings.get("bits", 4)))
    if "weight_packed" in parts:
        rows, words = parts["weight_packed"].shape[-2:]
        return (rows, words * 2)
    return parts["weight"].shape if "weight" in parts else None


def _blocks(stated: Any) -> list[str]:
    """Prefixes of block names, from a comma-separated text or a (nested) list."""
    if isinstance(stated, str):
        return [part.strip() for part in stated.split(",") if part.strip()]
    return [name for entry in stated or () for name in _blocks(entry)]


def _is_regex(entry: str) -> bool:
    return any(c in entry for c in "*+?[]()|^$\\")
