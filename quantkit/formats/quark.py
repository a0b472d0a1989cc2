"""AMD Quark's checkpoints (`quant_method: quark`): FP8, INT8, MXFP4 and INT4 weights.

A layer's settings are those of the first entry of `layer_quant_config` or `kv_cache_quant_config`
that names it, else `global_quant_config`; `exclude` keeps layers in 16 bit. Sources of the layout:
vLLM 0.32, `quantization/quark` (names, shapes, order of nibbles), Quark's export of Hugging Face
models.
INT4 weights are stored [in, out/8], eight codes of one input column in a word, in AWQ's order
(`pack_method: reorder`) or as they come; symmetric codes are signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import translate
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.schemes import NumberFormat, Scheme, scheme_for
from quantkit.errors import InputError
from quantkit.formats import inventory
from quantkit.formats.base import Declaration, LayerSpec, QuantWeight, TensorSpec
from quantkit.formats.dequantize import decode_e8m0
from quantkit.formats.inventory import Matcher, Parts, Pattern
from quantkit.formats.packing import unpack_awq, unpack_nibbles, unpack_words

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

NAME = "quark"

_FLOATS = ("F32", "BF16", "F16")
_SCALAR: tuple[tuple[int, ...], ...] = ((), (1,))
_FP8 = ("fp8_e4m3", "fp8_e4m3fn")
_INT4 = ("int4", "uint4")
_READ = "FP8 (per tensor, channel or block), INT8 (symmetric), MXFP4 (groups of 32), INT4 (groups)"
_PER_WORD = 8


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether config.json says `quant_method: quark`."""
    return (checkpoint.quantization_config or {}).get("quant_method") == NAME


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`.

    Raises InputError (`format.unsupported`), with what can be read, for other number formats.
    """
    settings = checkpoint.quantization_config or {}
    export = settings.get("export") or {}
    order = str(export.get("pack_method") or "reorder")
    found = inventory.take(checkpoint, quant_suffixes())
    if settings.get("layer_type_quant_config"):
        raise _unsupported("layers", "settings by their type (layer_type_quant_config)")
    of_cache = settings.get("kv_cache_quant_config") or {}
    by_layer = {**(settings.get("layer_quant_config") or {}), **of_cache}
    group = [*(export.get("kv_cache_group") or ()), *of_cache]
    for entry in group:
        _check_cache(entry, by_layer.get(entry) or {})
    cached = Matcher([_pattern(entry) for entry in group])
    named = Matcher([_pattern(entry) for entry in by_layer])
    exclude = Matcher([_pattern(entry) for entry in settings.get("exclude") or ()])

    def chosen(name: str) -> tuple[Scheme, str]:
        entry = named.entry(name)
        whole = by_layer[entry] if entry is not None else settings.get("global_quant_config")
        outputs = cached.entry(name) is not None or (bool(group) and name.endswith("q_proj"))
        return _scheme(name, whole or {}, outputs), order

    def unpacked(name: str, parts: Parts) -> tuple[int, ...] | None:
        if "weight" not in parts:
            return None
        stored = parts["weight"]
        if stored.dtype == "I32" and len(stored.shape) == 2:
            return (stored.shape[1] * _PER_WORD, stored.shape[0])
        if stored.dtype == "U8":
            return inventory.widen_input(name, stored.shape, 2, checkpoint)
        return stored.shape

    def target(module: Module) -> LayerSpec | None:
        if module.kind == "embedding":
            return None
        scheme, packing = chosen(module.name)
        return inventory.layer_spec(
            module, checkpoint, lambda shape: LayerSpec(scheme, packing, shape)
        )

    modules = inventory.linears(found, checkpoint.config, unpacked)
    layers, ignored, undeclared = inventory.sort_modules(modules, exclude.entry, target)
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        unmatched=exclude.unmatched(found, checkpoint.config),
        kv_cache="fp8" if group else "none",
    )


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`."""
    rows, columns = spec.shape
    number, given = spec.scheme.weight, spec.scheme.input
    grid = number.scale_shape(spec.shape)
    if number.element == "int8":
        scalars = _SCALAR if number.granularity == "tensor" else ((rows,), (rows, 1))
        result = {
            "weight": TensorSpec("weight", ("I8",), (spec.shape,)),
            "weight_scale": TensorSpec("scale", _FLOATS, scalars),
            "weight_zero_point": TensorSpec("zero_point", ("I8", "I32", *_FLOATS), scalars, False),
        }
    elif number.is_int:
        words = -(-rows // _PER_WORD)
        result = {
            "weight": TensorSpec("weight", ("I32",), ((columns, words),)),
            "weight_scale": TensorSpec("scale", _FLOATS, ((grid[1], rows),)),
            "weight_zero_point": TensorSpec(
                "zero_point", ("I32",), ((grid[1], words),), not number.symmetric
            ),
        }
    elif number.element == "fp4_e2m1":
        result = {
            "weight": TensorSpec("weight", ("U8",), ((rows, columns // 2),)),
            "weight_scale": TensorSpec("scale_e8m0", ("U8", "F8_E8M0"), (grid,)),
        }
    else:
        shapes = {"tensor": _SCALAR, "channel": ((rows,), (rows, 1))}
        result = {
            "weight": TensorSpec("weight", ("F8_E4M3",), (spec.shape,)),
            "weight_scale": TensorSpec("scale", _FLOATS, shapes.get(number.granularity, (grid,))),
        }
    if given is not None and not given.dynamic:
        result["input_scale"] = TensorSpec("input_scale", _FLOATS, _SCALAR)
        if given.is_int:
            result["input_zero_point"] = TensorSpec(
                "input_zero_point", ("I8", "I32", *_FLOATS), _SCALAR, not given.symmetric
            )
    result["bias"] = TensorSpec("bias", _FLOATS, ((rows,),), False)
    return inventory.fused(result, spec)


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return frozenset({"weight_scale", "weight_zero_point", "input_scale", "input_zero_point"})


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`."""
    number = spec.scheme.weight
    codes, scale = tensors["weight"], tensors["weight_scale"]
    zero = tensors.get("weight_zero_point")
    if number.element == "int8":
        grid = number.scale_shape(spec.shape)
        zero = None if zero is None or not bool(zero.any()) else zero.float().reshape(grid)
    elif number.is_int:
        codes = _nibbles(codes, spec).T.contiguous()
        scale = scale.float().T
        if zero is not None:
            zero = _nibbles(zero, spec).T.float().contiguous()
            zero = None if number.symmetric and not bool(zero.any()) else zero
    elif number.element == "fp4_e2m1":
        codes, scale = unpack_nibbles(codes), decode_e8m0(scale)
    static, shift = tensors.get("input_scale"), tensors.get("input_zero_point")
    moved = shift is not None and bool(shift.any())
    return QuantWeight(
        format=number,
        q=codes,
        scale=scale.float().reshape(number.scale_shape(spec.shape)).contiguous(),
        zero_point=zero,
        input_scale=None if static is None else static.float().reshape(()),
        input_zero_point=shift.float().reshape(()) if shift is not None and moved else None,
        bias=tensors.get("bias"),
    )


def _nibbles(words: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """int32 [n, out/8] → codes [n, out]: int8 -8 … 7 of a symmetric layer, else uint8 0 … 15."""
    import torch

    rows = spec.shape[0]
    reordered = spec.packing == "reorder"
    codes = unpack_awq(words) if reordered else unpack_words(words, 4, rows)
    codes = codes[:, :rows].to(torch.int8)
    if not spec.scheme.weight.symmetric:
        return codes.to(torch.uint8)
    return torch.where(codes > 7, codes - 16, codes)


def _scheme(name: str, settings: Mapping[str, Any], cached: bool) -> Scheme:
    """The scheme of a layer's settings; `cached` says that its output, too, may have a scale."""
    weight, given = settings.get("weight"), settings.get("input_tensors")
    if isinstance(weight, list) and len(weight) == 1:
        weight = weight[0]
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if settings.get("bias") or (settings.get("output_tensors") and not cached):
        raise _unsupported(name, "quantized outputs or biases")
    if not isinstance(weight, dict) or not isinstance(given, dict | None):
        raise _unsupported(name, "several number formats a tensor, or none")
    found = scheme_for(_weight(name, weight), None if given is None else _input(name, given))
    if found.weight.element == "int4" and found.input is not None:
        raise _unsupported(name, "INT4 weights with quantized activations")
    if found.weight.element == "int8" and found.input is not None and not found.input.is_int:
        raise _unsupported(name, "INT8 weights with activations of another kind")
    return found


def _weight(name: str, settings: Mapping[str, Any]) -> NumberFormat:
    dtype, kind = settings.get("dtype"), str(settings.get("qscheme"))
    size, block = settings.get("group_size"), settings.get("block_size")
    if settings.get("is_dynamic"):
        raise _unsupported(name, "weights that are quantized while serving")
    if dtype in _FP8 and kind in ("per_tensor", "per_channel"):
        return NumberFormat("fp8_e4m3", "tensor" if kind == "per_tensor" else "channel")
    if dtype in _FP8 and kind == "per_block" and isinstance(block, list) and len(block) == 2:
        return NumberFormat("fp8_e4m3", "block", block=(int(block[0]), int(block[1])))
    if (dtype, kind, size, settings.get("scale_format")) == ("fp4", "per_group", 32, "e8m0"):
        return NumberFormat("fp4_e2m1", "group", group_size=32, scale="e8m0")
    if dtype == "int8" and kind in ("per_tensor", "per_channel") and settings.get("symmetric"):
        return NumberFormat("int8", "tensor" if kind == "per_tensor" else "channel")
    if dtype in _INT4 and kind == "per_group" and isinstance(size, int) and size > 0:
        symmetric = bool(settings.get("symmetric", dtype == "int4"))
        return NumberFormat("int4", "group", group_size=size, symmetric=symmetric)
    symmetry = ", asymmetric" if settings.get("symmetric") is False else ""
    raise _unsupported(name, f"weights of dtype {dtype}, {kind}, group {size}{symmetry}")


def _input(name: str, settings: Mapping[str, Any]) -> NumberFormat:
    dtype, kind = settings.get("dtype"), settings.get("qscheme")
    size, dynamic = settings.get("group_size"), bool(settings.get("is_dynamic"))
    if dtype in _FP8 and kind == "per_tensor":
        return NumberFormat("fp8_e4m3", "tensor", dynamic=dynamic)
    if dtype in _FP8 and kind in ("per_channel", "per_token") and dynamic:
        return NumberFormat("fp8_e4m3", "token", dynamic=True)
    if dtype in _FP8 and kind == "per_group" and dynamic and isinstance(size, int):
        return NumberFormat("fp8_e4m3", "group", group_size=size, dynamic=True)
    symmetric = bool(settings.get("symmetric", True))
    if dtype == "int8" and kind == "per_tensor" and not dynamic:
        return NumberFormat("int8", "tensor", symmetric=symmetric)
    if dtype == "int8" and kind in ("per_channel", "per_token") and dynamic and symmetric:
        return NumberFormat("int8", "token", dynamic=True)
    if (dtype, kind, size) == ("fp4", "per_group", 32) and dynamic:
        return NumberFormat("fp4_e2m1", "group", group_size=32, scale="e8m0", dynamic=True)
    raise _unsupported(name, f"activations of dtype {dtype}, {kind}, group {size}")


def _check_cache(entry: str, settings: Mapping[str, Any]) -> None:
    """InputError (`format.unsupported`) for a KV cache in anything but FP8, one scale a tensor."""
    outputs = settings.get("output_tensors")
    if isinstance(outputs, list) and len(outputs) == 1:
        outputs = outputs[0]
    if not isinstance(outputs, dict):  # the group may name layers by another pattern
        return
    dtype, kind = outputs.get("dtype"), outputs.get("qscheme")
    if dtype not in _FP8 or kind != "per_tensor":
        raise _unsupported(entry, f"a KV cache of dtype {dtype}, {kind}")


def _unsupported(name: str, what: str) -> InputError:
    return InputError(
        f"Quark gives {name} {what}, which is not read here.",
        hint=f"read of Quark: {_READ}; for others ask the engine: vllm serve, on the GPU it is for",
        code="format.unsupported",
    )


def _pattern(entry: str) -> Pattern:
    """A name, a shell wildcard, or `re:` with a regular expression from the start of the name."""
    if entry.startswith("re:"):
        return Pattern(entry, "regex", entry[3:])
    if any(sign in entry for sign in "*?["):
        return Pattern(entry, "regex", translate(entry))
    return Pattern(entry, "exact", entry)
