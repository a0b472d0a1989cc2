"""compressed-tensors checkpoints, as LLM Compressor, AutoRound and `rtn_*` write them.

Each group of the configuration is stored in one of seven packings; the layout of the tensors is
that of `compressed_tensors.compressors` (0.19). Where integer codes are packed they carry an
offset of 2^(bits - 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.checkpoint.network.modules import Module
from quantkit.errors import InputError
from quantkit.formats import inventory
from quantkit.formats.base import Declaration, LayerSpec, Problem, QuantWeight, TensorSpec
from quantkit.formats.compressed_tensors_check import check_documents, check_settings
from quantkit.formats.compressed_tensors_config import (
    NAME,
    Group,
    kv_cache_of,
    quantization_config,
    read_groups,
)
from quantkit.formats.dequantize import decode_e8m0
from quantkit.formats.inventory import Inventory, Matcher, Parts, Pattern
from quantkit.formats.packing import (
    unpack_nibbles,
    unpack_padded_words,
    unpack_words,
    words_for,
)

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

__all__ = [
    "NAME", "declare", "expected", "quant_suffixes", "quantization_config", "read", "recognises",
]  # fmt: skip

_FLOATS = ("BF16", "F16", "F32")
_SCALAR: tuple[tuple[int, ...], ...] = ((1,), ())


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether config.json says `quant_method: compressed-tensors` (or has its groups)."""
    config = checkpoint.quantization_config or {}
    return config.get("quant_method") in (None, NAME) and "config_groups" in config


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`."""
    config = checkpoint.quantization_config or {}
    check_documents(checkpoint)
    check_settings(config)
    groups = read_groups(config)
    found = inventory.take(checkpoint, quant_suffixes())
    targets = [(target, group) for group in groups for target in group.targets]
    names = Matcher([_pattern(target) for target, _ in targets])
    group_of: dict[str, Group] = {}
    for target, group in targets:
        group_of.setdefault(target, group)
    ignore = Matcher([_pattern(entry) for entry in config.get("ignore") or ()])

    def choice(name: str) -> Group | None:
        entry = names.entry(name)
        return group_of[entry] if entry is not None else group_of.get("Linear")

    def unpacked(name: str, parts: Parts) -> tuple[int, ...] | None:
        return _unpacked(checkpoint, parts, choice(name))

    def target_of(module: Module) -> LayerSpec | None:
        group = choice(module.name)
        named = names.entry(module.name) is not None
        if group is None or not (named or inventory.is_linear(module)):
            return None

        def spec(shape: tuple[int, int]) -> LayerSpec:
            return LayerSpec(group.scheme, group.packing, shape)

        return inventory.layer_spec(module, checkpoint, spec)

    modules = inventory.linears(found, checkpoint.config, unpacked)
    layers, ignored, undeclared = inventory.sort_modules(modules, ignore.entry, target_of)
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        unmatched=ignore.unmatched(found, checkpoint.config),
        kv_cache=kv_cache_of(config),
        problems=_target_problems(names, found, checkpoint),
    )


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`."""
    rows, columns = spec.shape
    weight = spec.scheme.weight
    grid = weight.scale_shape(spec.shape)
    grids: tuple[tuple[int, ...], ...] = (grid,)
    if weight.granularity == "tensor":
        grids = (*_SCALAR, grid)
    elif weight.granularity == "channel":
        grids = (grid, (rows,))
    packed = spec.packing == "pack-quantized"
    result: dict[str, TensorSpec] = {}

    if packed:
        widths = {words_for(columns, weight.bits), -(-columns // (32 // weight.bits))}
        shapes = tuple((rows, width) for width in sorted(widths))
        result["weight_packed"] = TensorSpec("weight", ("I32",), shapes)
        result["weight_shape"] = TensorSpec("shape", ("I64", "I32"), ((2,),))
    elif weight.element == "fp4_e2m1":
        result["weight_packed"] = TensorSpec("weight", ("U8",), ((rows, columns // 2),))
    else:
        dtype = "I8" if weight.is_int else "F8_E4M3"
        result["weight"] = TensorSpec("weight", (dtype,), (spec.shape,))

    if weight.scale == "e8m0":
        result["weight_scale"] = TensorSpec("scale_e8m0", ("U8", "F8_E8M0"), grids)
    elif weight.scale == "e4m3":
        result["weight_scale"] = TensorSpec("scale", ("F8_E4M3",), grids)
        result["weight_global_scale"] = TensorSpec("global_scale_inverse", ("F32",), _SCALAR)
    else:
        result["weight_scale"] = TensorSpec("scale", _FLOATS, grids)

    if weight.is_int:
        in_words = packed and weight.granularity in ("group", "channel")
        if in_words and not weight.symmetric:
            shape = (words_for(rows, weight.bits), grid[1])
            result["weight_zero_point"] = TensorSpec("zero_point", ("I32",), (shape,))
        else:
            result["weight_zero_point"] = TensorSpec(
                "zero_point", ("I8",), grids, required=not weight.symmetric
            )
        result["weight_g_idx"] = TensorSpec("group_index", ("I32",), ((columns,),), False)

    activation = spec.scheme.input
    if activation is not None and activation.scale == "e4m3":
        result["input_global_scale"] = TensorSpec("input_global_scale_inverse", ("F32",), _SCALAR)
    elif activation is not None and not activation.dynamic:
        result["input_scale"] = TensorSpec("input_scale", _FLOATS, _SCALAR)
        result["input_zero_point"] = TensorSpec(
            "input_zero_point", ("I8",), _SCALAR, required=not activation.symmetric
        )
    result["bias"] = TensorSpec("bias", _FLOATS, ((rows,),), False)
    return inventory.fused(result, spec)


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return frozenset(
        {
            "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale",
            "weight_shape", "weight_g_idx", "input_scale", "input_zero_point",
            "input_global_scale",
        }
    )  # fmt: skip


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`. Raises InputError when `weight_shape` is not the declared shape."""
    number = spec.scheme.weight
    rows, columns = spec.shape
    grid = number.scale_shape(spec.shape)
    scale = tensors["weight_scale"]
    zero_point = tensors.get("weight_zero_point")

    if spec.packing == "pack-quantized":
        stated = tensors["weight_shape"].tolist()
        if stated != [rows, columns]:
            raise InputError(
                f"weight_shape is {stated} where the packed weight has {[rows, columns]}.",
                hint="export the checkpoint again: its packed weights do not fit its configuration",
                code="format.shape",
            )
        words = tensors["weight_packed"]
        dense = words.shape[1] == words_for(columns, number.bits)
        unpack = unpack_words if dense else unpack_padded_words
        codes = _signed(unpack(words, number.bits, columns), number.bits)
        if zero_point is not None and str(zero_point.dtype) == "torch.int32":
            along_rows = unpack_words(zero_point.T.contiguous(), number.bits, rows)
            zero_point = _signed(along_rows, number.bits).T
    elif number.element == "fp4_e2m1":
        codes = unpack_nibbles(tensors["weight_packed"])
    else:
        codes = tensors["weight"]

    inverse = tensors.get("weight_global_scale")
    static = tensors.get("input_scale")
    if static is None and "input_global_scale" in tensors:
        static = 1 / tensors["input_global_scale"].float()
    input_zero_point = tensors.get("input_zero_point")
    return QuantWeight(
        format=number,
        q=codes,
        scale=(decode_e8m0(scale) if number.scale == "e8m0" else scale.float()).reshape(grid),
        zero_point=None if zero_point is None else zero_point.float().reshape(grid),
        global_scale=None if inverse is None else 1 / inverse.double().reshape(()),
        g_idx=tensors.get("weight_g_idx"),
        input_scale=None if static is None else static.float(),
        input_zero_point=None if input_zero_point is None else input_zero_point.float(),
        bias=tensors.get("bias"),
    )


def _unpacked(checkpoint: Checkpoint, parts: Parts, group: Group | None) -> tuple[int, ...] | None:
    packed = parts.get("weight_packed")
    if packed is None or group is None:
        return parts["weight"].shape if "weight" in parts else None
    number = group.scheme.weight
    if group.packing != "pack-quantized":
        return (*packed.shape[:-1], packed.shape[-1] * 2)
    scale = parts.get("weight_scale")
    if number.granularity == "group" and scale is not None and len(scale.shape) == 2:
        assert number.group_size
        return (packed.shape[0], scale.shape[1] * number.group_size)
    if "weight_shape" in parts:
        rows, columns = checkpoint.tensor(parts["weight_shape"].name).tolist()
        return (rows, columns)
    return (packed.shape[0], packed.shape[1] * 32 // number.bits)


def _pattern(entry: str) -> Pattern:
    if entry.startswith("re:"):
        return Pattern(entry, "regex", entry[3:])
    return Pattern(entry, "exact", entry)


def _target_problems(
    names: Matcher, found: Inventory, checkpoint: Checkpoint
) -> tuple[Problem, ...]:
    """Targets that name no module; a plain word is a class and cannot be judged."""
    return tuple(
        Problem(
            "format.layer_missing",
            f"config_groups targets {entry!r} and the checkpoint has no such module",
            "correct the target in config.json, or export the model again",
            "warning" if entry.startswith("re:") else "error",
        )
        for entry in names.unmatched(found, checkpoint.config)
        if entry.startswith("re:") or "." in entry
    )


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes with an offset of 2^(bits - 1) → int8."""
    import torch

    if bits == 8:
        return (codes ^ 128).view(torch.int8)
    return codes.view(torch.int8) - (1 << (bits - 1))
