"""The `quantization_config` of compressed-tensors, to number formats and back.

Fields as `compressed_tensors.quantization.QuantizationConfig` (0.19) serialises them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.checkpoint.schemes import (
    Element,
    Granularity,
    NumberFormat,
    ScaleFormat,
    Scheme,
    scheme_for,
)
from quantkit.engines.aliases import merged_aliases
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec

NAME = "compressed-tensors"
VERSION = "0.19.0"

PACKINGS = (
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)

_ELEMENTS: dict[tuple[str, int], Element] = {
    ("int", 2): "int2",
    ("int", 3): "int3",
    ("int", 4): "int4",
    ("int", 8): "int8",
    ("float", 8): "fp8_e4m3",
    ("float", 4): "fp4_e2m1",
}
_STRATEGIES: dict[str, Granularity] = {
    "tensor": "tensor",
    "channel": "channel",
    "group": "group",
    "tensor_group": "group",
    "block": "block",
    "token": "token",
}


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups` that quantizes weights."""

    targets: tuple[str, ...]
    scheme: Scheme
    packing: str


def read_groups(config: Mapping[str, Any]) -> list[Group]:
    """The groups of a configuration, in its order.

    Raises InputError (`format.*`) for number formats, packings and sparsity that are not supported.
    """
    sparsity = (config.get("sparsity_config") or {}).get("format")
    if sparsity not in (None, "dense"):
        raise InputError(
            f"compressed-tensors sparsity {sparsity!r} is not supported.",
            hint="use a checkpoint that is quantized and not sparse",
            code="format.sparse",
        )
    groups = []
    for name, entry in (config.get("config_groups") or {}).items():
        if not isinstance(entry, dict):
            raise _unsupported(f"config group {name!r} is {entry!r}, not an object")
        if entry.get("weights") is None:
            continue
        weight = read_number(entry["weights"])
        inputs = entry.get("input_activations")
        scheme = scheme_for(weight, read_number(inputs) if inputs else None)
        packing = entry.get("format") or config.get("format")
        if packing in (None, "mixed-precision", "dense", "fakequant"):
            packing = packing_of(scheme)
        if packing not in PACKINGS:
            raise _unsupported(f"compressed-tensors format {packing!r} is not supported")
        groups.append(Group(tuple(entry.get("targets") or ()), scheme, packing))
    return groups


def read_number(arguments: Mapping[str, Any]) -> NumberFormat:
    """One `QuantizationArgs` object. Raises InputError for what has no number format here."""
    kind, bits = str(arguments.get("type", "int")).lower(), arguments.get("num_bits", 8)
    if (kind, bits) not in _ELEMENTS:
        raise _unsupported(f"compressed-tensors type {kind!r} with {bits} bits is not supported")
    group_size = arguments.get("group_size")
    grouped = isinstance(group_size, int) and group_size > 0
    default = "group" if grouped else "channel" if group_size == -1 else "tensor"
    strategy = str(arguments.get("strategy") or default).lower()
    if strategy not in _STRATEGIES:
        raise _unsupported(f"compressed-tensors strategy {strategy!r} is not supported")
    element = _ELEMENTS[kind, bits]
    scale: ScaleFormat = "float"
    if strategy == "tensor_group":
        scale = "e4m3"
    elif grouped and (element == "fp4_e2m1" or str(arguments.get("scale_dtype")).endswith("uint8")):
        scale = "e8m0"
    block = arguments.get("block_structure")
    if isinstance(block, str):
        block = [int(side) for side in block.split("x")]
    return NumberFormat(
        element,
        _STRATEGIES[strategy],
        group_size=group_size if grouped else None,
        block=(block[0], block[1]) if block else None,
        symmetric=bool(arguments.get("symmetric", True)),
        dynamic=bool(arguments.get("dynamic", False)),
        scale=scale,
    )


def packing_of(scheme: Scheme) -> str:
    """The packing that compressed-tensors chooses for a scheme."""
    weight = scheme.weight
    if weight.element == "fp4_e2m1":
        return "mxfp4-pack-quantized" if weight.scale == "e8m0" else "nvfp4-pack-quantized"
    if weight.scale == "e8m0":
        return "mxfp8-quantized"
    if weight.is_int:
        return "pack-quantized" if scheme.input is None else "int-quantized"
    return "naive-quantized" if scheme.input is None else "float-quantized"


def kv_cache_of(config: Mapping[str, Any]) -> str:
    """The element of `kv_cache_scheme`: "none", "fp8", "nvfp4" or "int8"."""
    arguments = config.get("kv_cache_scheme")
    if not arguments:
        return "none"
    element = read_number(arguments).element
    return {"fp8_e4m3": "fp8", "fp4_e2m1": "nvfp4"}.get(element, element)


def quantization_config(layers: Mapping[str, LayerSpec], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these layers.

    Layers of one scheme are targeted as "Linear" less `ignore`, the linear modules left in 16 bit;
    several schemes target their layers by name, and by that of the layer engines merge them into.
    """
    groups: dict[tuple[Scheme, str], list[str]] = {}
    for name, spec in layers.items():
        groups.setdefault((spec.scheme, spec.packing), []).append(name)
    packings = {packing for _, packing in groups}
    return {
        "config_groups": {
            f"group_{index}": {
                "format": packing,
                "input_activations": _arguments(scheme.input),
                "output_activations": None,
                "targets": ["Linear"] if len(groups) == 1 else [*names, *merged_aliases(names)],
                "weights": _arguments(scheme.weight),
            }
            for index, ((scheme, packing), names) in enumerate(groups.items())
        },
        "format": packings.pop() if len(packings) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": NAME,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _arguments(number: NumberFormat | None) -> dict[str, Any] | None:
    if number is None:
        return None
    two_level = number.scale == "e4m3"
    scale_dtypes = {"float": None, "e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
    return {
        "actorder": None,
        "block_structure": list(number.block) if number.block else None,
        "dynamic": "local" if number.dynamic and two_level else number.dynamic,
        "group_size": number.group_size,
        "num_bits": number.bits,
        "observer": None if number.dynamic else "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": scale_dtypes[number.scale],
        "strategy": "tensor_group" if two_level else number.granularity,
        "symmetric": number.symmetric,
        "type": "int" if number.is_int else "float",
        "zp_dtype": None if number.symmetric else "torch.int8",
    }


def _unsupported(what: str) -> InputError:
    return InputError(
        f"{what}.",
        hint=f"supported: {', '.join(PACKINGS)} with int2, int3, int4, int8, FP8 E4M3 or FP4 E2M1",
        code="format.unsupported",
    )
