"""Ascend checkpoints of msModelSlim: `quant_model_description.json` names every tensor's type.

config.json says nothing. The description maps tensor names to "FLOAT" or the type of their layer;
layout of the types: msModelSlim 26.1, `quant_service/modelslim_v1/save/ascendv1.py`. W8A8 stores
no weight scale: `deq_scale` is weight scale × input scale, in float32 or, for float16 models, the
float32's bits in int64; `quant_bias` folds the input offset and the layer's bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.schemes import SCHEMES, NumberFormat, Scheme
from quantkit.errors import InputError
from quantkit.formats import inventory
from quantkit.formats.base import Declaration, LayerSpec, Problem, QuantWeight, TensorSpec
from quantkit.formats.inventory import Parts
from quantkit.formats.packing import unpack_nibbles

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

NAME = "ascend"
SIDE_FILE = "quant_model_description.json"

_INT8 = NumberFormat("int8", "channel")
TYPES: dict[str, Scheme] = {
    "W8A16": SCHEMES["w8a16"],
    "W8A8": Scheme("w8a8", _INT8, NumberFormat("int8", "tensor", symmetric=False)),
    "W8A8_MIX": Scheme("w8a8", _INT8, NumberFormat("int8", "tensor", symmetric=False)),
    "W8A8_DYNAMIC": SCHEMES["w8a8_dynamic"],
    "W4A8_DYNAMIC": SCHEMES["w4a8_dynamic"],
    "W4A4_DYNAMIC": SCHEMES["w4a4_dynamic"],
    "WFP8AFP8_DYNAMIC": SCHEMES["fp8_dynamic"],
}
"""Type of a layer → scheme; a stored scale of several columns makes it one a group."""

_FLOAT = "FLOAT"
_FLOATS = ("F32", "BF16", "F16")
_STATIC = ("W8A8", "W8A8_MIX")


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether quant_model_description.json is there."""
    return SIDE_FILE in checkpoint.documents


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`; layers of type FLOAT count as ignored by the entry "FLOAT"."""
    types = {k: v for k, v in checkpoint.documents[SIDE_FILE].items() if isinstance(v, str)}
    found = inventory.take(checkpoint, quant_suffixes())

    def type_of(name: str) -> str | None:
        return types.get(f"{name}.weight")

    def ignored_by(name: str) -> str | None:
        return _FLOAT if type_of(name) == _FLOAT else None

    def unpacked(name: str, parts: Parts) -> tuple[int, ...] | None:
        weight, scale = parts.get("weight"), parts.get("weight_scale")
        if weight is None:
            return None
        if type_of(name) == "W4A8_DYNAMIC" and scale is not None:
            return (scale.shape[0], weight.shape[1])
        return weight.shape

    def target(module: Module) -> LayerSpec | None:
        stated = type_of(module.name)
        if stated is None:
            return None
        if stated not in TYPES:
            raise InputError(
                f"{SIDE_FILE} gives {module.name} the type {stated!r}, which is not supported.",
                hint=f"supported: {_FLOAT}, {', '.join(TYPES)}",
                code="format.unsupported",
            )
        scale = found.modules[module.name].get("weight_scale")
        columns = module.shape[1]
        scheme = TYPES[stated]
        if scale is not None and len(scale.shape) == 2 and scale.shape[1] > 1:
            scheme = scheme.with_weight(granularity="group", group_size=columns // scale.shape[1])
        return LayerSpec(scheme, stated, (module.shape[0], columns))

    modules = [
        m for m in inventory.linears(found, checkpoint.config, unpacked) if len(m.shape) == 2
    ]
    layers, ignored, undeclared = inventory.sort_modules(modules, ignored_by, target)
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        kv_cache="int8"
        if "C8" in (types.get("kv_cache_type"), types.get("kv_quant_type"))
        else "none",
        problems=_problems(types, layers, checkpoint),
    )


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`."""
    rows, columns = spec.shape
    weight = spec.scheme.weight
    column: tuple[tuple[int, ...], ...] = (weight.scale_shape(spec.shape),)
    if weight.granularity == "channel":
        column = (*column, (rows,))
    scalar: tuple[tuple[int, ...], ...] = ((1,), ())
    packed: tuple[tuple[int, ...], ...] = ((rows // 2, columns),)
    shapes = packed if spec.packing == "W4A8_DYNAMIC" else (spec.shape,)
    result = {
        "weight": TensorSpec("weight", ("I8",) if weight.is_int else ("F8_E4M3",), shapes),
        "bias": TensorSpec("bias", _FLOATS, ((rows,),), False),
    }
    if spec.packing in _STATIC:
        result["input_scale"] = TensorSpec("input_scale", _FLOATS, scalar)
        result["input_offset"] = TensorSpec("input_zero_point", (*_FLOATS, "I8"), scalar)
        result["deq_scale"] = TensorSpec("dequant_scale", ("F32", "I64"), ((rows,),))
        result["quant_bias"] = TensorSpec("offset", ("I32",), ((rows,),))
    if spec.packing != "W8A8":
        result["weight_scale"] = TensorSpec("scale", _FLOATS, column)
        result["weight_offset"] = TensorSpec("zero_point", _FLOATS, column)
    if spec.packing == "W4A8_DYNAMIC":
        result["scale_bias"] = TensorSpec("offset", _FLOATS, ((rows, 1), (rows, 16)))
    return result


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return frozenset(
        {
            "weight_scale", "weight_offset", "input_scale", "input_offset", "deq_scale",
            "quant_bias", "scale_bias",
        }
    )  # fmt: skip


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`."""
    import torch

    number = spec.scheme.weight
    grid = number.scale_shape(spec.shape)
    codes = tensors["weight"]
    if spec.packing == "W4A8_DYNAMIC":
        nibbles = unpack_nibbles(codes.view(torch.uint8).T.contiguous()).T.view(torch.int8)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    input_scale = tensors.get("input_scale")
    if spec.packing == "W8A8":
        assert input_scale is not None
        scale = _float_bits(tensors["deq_scale"]) / input_scale.float()
    else:
        scale = tensors["weight_scale"].float()
    offset = tensors.get("weight_offset")
    input_offset = tensors.get("input_offset")
    return QuantWeight(
        format=number,
        q=codes,
        scale=scale.reshape(grid),
        zero_point=None if offset is None else offset.float().reshape(grid),
        input_scale=None if input_scale is None else input_scale.float(),
        input_zero_point=None if input_offset is None else input_offset.float(),
        bias=tensors.get("bias"),
    )


def _float_bits(scale: torch.Tensor) -> torch.Tensor:
    """float32 as it is, or from its bits in int64."""
    import torch

    if scale.dtype == torch.int64:
        return scale.to(torch.int32).view(torch.float32)
    return scale.float()


def _problems(
    types: Mapping[str, Any], layers: Mapping[str, LayerSpec], checkpoint: Checkpoint
) -> tuple[Problem, ...]:
    known = {*TYPES, _FLOAT}
    named = {n: t for n, t in types.items() if "." in n and t in known}
    absent = [n for n in named if n not in checkpoint.tensors]
    mixed = [
        f"{name}.{suffix}"
        for name, spec in layers.items()
        for suffix in quant_suffixes()
        if types.get(f"{name}.{suffix}", spec.packing) != spec.packing
    ]
    hint = "export the model again with msModelSlim: the description does not fit the weights"
    return tuple(
        [
            Problem("format.tensor_missing", f"{SIDE_FILE} names {name}, which is absent", hint)
            for name in absent
        ]
        + [
            Problem(
                "format.contradiction",
                f"{SIDE_FILE} gives {name} type {types[name]!r}, unlike its layer's weight",
                hint,
            )
            for name in mixed
        ]
    )
