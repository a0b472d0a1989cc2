"""ModelOpt's unified Hugging Face checkpoints: `quant_method: modelopt` and hf_quant_config.json.

One algorithm a checkpoint (`quant_algo`), or one a layer (`MIXED_PRECISION`, `quantized_layers`).
config.json and hf_quant_config.json say the same in two spellings; older exports have only the
second. Layout of the tensors: `modelopt.torch.export.quant_utils` (0.47).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.schemes import SCHEMES, NumberFormat, Scheme
from quantkit.errors import InputError
from quantkit.formats import inventory
from quantkit.formats.base import Declaration, LayerSpec, Problem, QuantWeight, Role, TensorSpec
from quantkit.formats.dequantize import decode_e8m0
from quantkit.formats.inventory import Matcher, Parts, glob_pattern
from quantkit.formats.packing import unpack_nibbles

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

NAME = "modelopt"
SIDE_FILE = "hf_quant_config.json"
_MIXED = "MIXED_PRECISION"

_FP8_STATIC = NumberFormat("fp8_e4m3", "tensor")
_FP4_GROUP_32 = replace(SCHEMES["nvfp4a16"].weight, group_size=32)

ALGORITHMS: dict[str, Scheme] = {
    "FP8": SCHEMES["fp8"],
    "FP8_PER_CHANNEL_PER_TOKEN": SCHEMES["fp8_dynamic"],
    "FP8_PB_WO": SCHEMES["fp8_block_weight_only"],
    "W8A8_SQ_PER_CHANNEL": SCHEMES["w8a8"],
    "W8A16": SCHEMES["w8a16"],
    "W4A16_AWQ": SCHEMES["w4a16"],
    "W4A8_AWQ": SCHEMES["w4a8_awq"],
    "NVFP4": SCHEMES["nvfp4"],
    "NVFP4_AWQ": SCHEMES["nvfp4"],
    "W4A16_NVFP4": SCHEMES["nvfp4a16"],
    "W4A8_NVFP4_FP8": Scheme("w4a8_nvfp4_fp8", _FP4_GROUP_32, _FP8_STATIC),
    "MXFP4": SCHEMES["mxfp4"],
    "MXFP8": SCHEMES["mxfp8"],
}
"""`quant_algo` (upper case) → scheme; group size and block come from the checkpoint."""

_INT4 = {"W4A16_AWQ", "W4A8_AWQ"}
_STATIC_INPUT = {
    "FP8", "W8A8_SQ_PER_CHANNEL", "W4A8_AWQ", "NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8",
}  # fmt: skip
_SMOOTHED = {"W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ"}
_SCALAR: tuple[tuple[int, ...], ...] = ((), (1,))


@dataclass(frozen=True)
class _Settings:
    """What one of the two files says."""

    algorithm: str | None
    group_size: int | None
    exclude: tuple[str, ...]
    kv_cache: str
    layers: Mapping[str, Mapping[str, Any]]


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether config.json or hf_quant_config.json is ModelOpt's."""
    config = checkpoint.quantization_config or {}
    named = str(config.get("quant_method", "")).lower().startswith("modelopt")
    return named or "quantization" in checkpoint.documents.get(SIDE_FILE, {})


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`; the two files disagreeing is a Problem.

    Vision and audio towers without scales count as undeclared: older exports list none of them
    and engines never quantize them.
    """
    settings, problems = _read_settings(checkpoint)
    found = inventory.take(checkpoint, quant_suffixes())
    named = Matcher([glob_pattern(entry) for entry in settings.layers])
    config = checkpoint.config

    def choice(name: str) -> tuple[str, int | None] | None:
        if settings.algorithm is None:
            return None
        if settings.algorithm != _MIXED:
            return _algorithm(settings.algorithm), settings.group_size
        entry = named.entry(name)
        if entry is None:
            return None
        layer = settings.layers[entry]
        return _algorithm(layer.get("quant_algo")), layer.get("group_size")

    def unpacked(name: str, parts: Parts) -> tuple[int, ...] | None:
        if "weight" not in parts:
            return None
        weight, chosen = parts["weight"], choice(name)
        if weight.dtype != "U8" or chosen is None:
            return weight.shape
        if chosen[0] in _INT4:
            return (*weight.shape[:-2], weight.shape[-2] * 2, weight.shape[-1])
        return inventory.widen_input(name, weight.shape, 2, checkpoint)

    def target(module: Module) -> LayerSpec | None:
        chosen = choice(module.name)
        scale = found.modules[module.name].get("weight_scale")
        tower = module.kind == "tower" and scale is None
        if chosen is None or module.kind == "embedding" or tower:
            return None
        algorithm, group_size = chosen
        scheme = ALGORITHMS[algorithm]

        def spec(shape: tuple[int, int]) -> LayerSpec:
            grid = scale.shape if scale is not None else ()
            return LayerSpec(_resize(scheme, group_size, shape, grid), algorithm, shape)

        return inventory.layer_spec(module, checkpoint, spec)

    exclude = Matcher([glob_pattern(entry) for entry in settings.exclude])
    modules = inventory.linears(found, config, unpacked)
    layers, ignored, undeclared = inventory.sort_modules(modules, exclude.entry, target)
    problems += [
        Problem(
            "format.layer_missing",
            f"quantized_layers names {entry!r} and the checkpoint has no such module",
            f"correct the name in config.json and {SIDE_FILE}, or export the model again",
        )
        for entry in named.unmatched(found, config)
    ]
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        unmatched=exclude.unmatched(found, config),
        kv_cache=settings.kv_cache,
        problems=tuple(problems),
    )


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`."""
    rows, columns = spec.shape
    weight = spec.scheme.weight
    grid = weight.scale_shape(spec.shape)
    algorithm = spec.packing
    floats = ("F32", "BF16", "F16")
    result: dict[str, TensorSpec] = {}

    if algorithm in _INT4:
        result["weight"] = TensorSpec("weight", ("U8",), ((rows // 2, columns),))
    elif weight.element == "fp4_e2m1":
        result["weight"] = TensorSpec("weight", ("U8",), ((rows, columns // 2),))
    else:
        dtype = "I8" if weight.is_int else "F8_E4M3"
        result["weight"] = TensorSpec("weight", (dtype,), (spec.shape,))

    if weight.scale == "e8m0":
        result["weight_scale"] = TensorSpec("scale_e8m0", ("U8", "F8_E8M0"), (grid,))
    elif weight.scale == "e4m3":
        result["weight_scale"] = TensorSpec("scale", ("F8_E4M3",), (grid,))
        result["weight_scale_2"] = TensorSpec("global_scale", ("F32",), _SCALAR)
    elif weight.granularity == "tensor":
        result["weight_scale"] = TensorSpec("scale", floats, _SCALAR)
    elif weight.granularity == "channel":
        result["weight_scale"] = TensorSpec("scale", floats, ((rows,), (rows, 1)))
    elif weight.granularity == "block":
        stretched = (grid[0], 1, grid[1], 1)
        result["weight_scale"] = TensorSpec("scale", floats, (stretched, grid))
    else:
        result["weight_scale"] = TensorSpec("scale", floats, (grid,))

    if algorithm == "W4A8_AWQ":
        result["weight_scale_2"] = TensorSpec("cast_scale", ("F32",), _SCALAR)
    if algorithm in _STATIC_INPUT:
        two_level = algorithm in ("NVFP4", "NVFP4_AWQ")
        role: Role = "input_global_scale" if two_level else "input_scale"
        result["input_scale"] = TensorSpec(role, ("F32",), _SCALAR)
    if algorithm in _SMOOTHED:
        result["pre_quant_scale"] = TensorSpec("input_multiplier", floats, ((columns,),), False)
    result["bias"] = TensorSpec("bias", floats, ((rows,),), False)
    return inventory.fused(result, spec)


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`."""
    import torch

    stored = tensors["weight"]
    weight = spec.scheme.weight
    scale = tensors["weight_scale"]
    if weight.scale == "e8m0":
        scale = decode_e8m0(scale)
    if spec.packing in _INT4:
        codes = unpack_nibbles(stored.T.contiguous()).T.to(torch.int8)
        stored = torch.where(codes > 7, codes - 16, codes)
    elif weight.element == "fp4_e2m1":
        stored = unpack_nibbles(stored)
    smoothing = tensors.get("pre_quant_scale")
    static = tensors.get("input_scale")
    return QuantWeight(
        format=weight,
        q=stored,
        scale=scale.float().reshape(weight.scale_shape(spec.shape)),
        global_scale=(
            tensors["weight_scale_2"].double().reshape(()) if weight.scale == "e4m3" else None
        ),
        input_scale=None if static is None else static.float(),
        input_multiplier=None if smoothing is None else smoothing.float(),
        bias=tensors.get("bias"),
    )


def _read_settings(checkpoint: Checkpoint) -> tuple[_Settings, list[Problem]]:
    """The settings, and where config.json and hf_quant_config.json disagree."""
    sources = {}
    if checkpoint.quantization_config is not None:
        sources["config.json"] = _settings(checkpoint.quantization_config)
    if SIDE_FILE in checkpoint.documents:
        sources[SIDE_FILE] = _settings(checkpoint.documents[SIDE_FILE])
    stated = list(sources.values())
    first, last = stated[0], stated[-1]
    if first.algorithm is None and last.algorithm is None and first.kv_cache == "none":
        raise InputError(
            f"{' and '.join(sources)} of {checkpoint.path} name no quant_algo.",
            hint=f"supported: {', '.join(ALGORITHMS)}, {_MIXED}",
            code="format.unknown_algorithm",
        )
    problems = [
        Problem(
            "format.contradiction",
            f"config.json says {what} {ours!r} and {SIDE_FILE} says {theirs!r}",
            "export the checkpoint again: engines read one file or the other",
        )
        for what, ours, theirs in (
            ("quant_algo", first.algorithm, last.algorithm),
            ("group_size", first.group_size, last.group_size),
            ("excluded modules", sorted(first.exclude), sorted(last.exclude)),
            ("KV cache", first.kv_cache, last.kv_cache),
            ("quantized_layers", dict(first.layers), dict(last.layers)),
        )
        if ours != theirs and not (what in ("quant_algo", "group_size") and None in (ours, theirs))
    ]
    return (
        replace(
            first,
            algorithm=first.algorithm or last.algorithm,
            group_size=first.group_size or last.group_size,
        ),
        problems,
    )


def _settings(document: Mapping[str, Any]) -> _Settings:
    body = document.get("quantization")
    body = body if isinstance(body, dict) else document
    algorithm = body.get("quant_algo")
    groups = body.get("config_groups") or {}
    sizes = {(group.get("weights") or {}).get("group_size") for group in groups.values()}
    cache = body.get("kv_cache_quant_algo") or body.get("kv_cache_scheme")
    if isinstance(cache, dict):
        cache = f"{'FP' if cache.get('type') == 'float' else 'INT'}{cache.get('num_bits')}"
    return _Settings(
        algorithm=str(algorithm).upper() if algorithm else None,
        group_size=body.get("group_size") or (sizes.pop() if len(sizes) == 1 else None),
        exclude=tuple(body.get("exclude_modules") or body.get("ignore") or ()),
        kv_cache=str(cache or "none").lower(),
        layers=body.get("quantized_layers") or {},
    )


def _algorithm(name: object) -> str:
    known = str(name).upper()
    if known not in ALGORITHMS:
        raise InputError(
            f"ModelOpt quant_algo {name!r} is not supported.",
            hint=f"supported: {', '.join(ALGORITHMS)}, {_MIXED}",
            code="format.unknown_algorithm",
        )
    return known


def _resize(
    scheme: Scheme, group_size: int | None, shape: tuple[int, int], grid: tuple[int, ...]
) -> Scheme:
    """The scheme with the checkpoint's group or block size.

    ModelOpt's config.json does not state the group of its integer schemes nor the block of
    FP8_PB_WO; there the shape of the stored scale says it.
    """
    rows, columns = shape
    if scheme.weight.granularity == "group":
        if group_size is None and len(grid) >= 2 and columns % grid[-1] == 0:
            group_size = columns // grid[-1]
        return scheme.with_weight(group_size=group_size or scheme.weight.group_size)
    if scheme.weight.granularity == "block":
        sides = [side for side in grid if side != 1] if len(grid) == 4 else list(grid)
        fits = (b for b in (128, 64, 32, 256) if sides == [ceil(rows / b), ceil(columns / b)])
        size = group_size or next(fits, 128)
        return scheme.with_weight(block=(size, size))
    return scheme
