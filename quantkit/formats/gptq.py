"""GPTQ checkpoints (`quant_method: gptq`), as AutoGPTQ, GPTQModel and AutoRound write them.

`qweight` packs unsigned codes along the input dimension, `qzeros` along the output; both are
[in, out]-major. The older layout, "gptq", stores zero points less one (modulo 2^bits), "gptq_v2"
stores them as they are. `dynamic` overrides settings by regular expressions on module names, the
first match first, "-:" meaning: leave in 16 bit. Layout: GPTQModel 7.6, `nn_modules/qlinear`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.network.modules import Module, layer_index
from quantkit.checkpoint.network.patterns import compiled
from quantkit.checkpoint.schemes import Element, NumberFormat, Scheme, scheme_for
from quantkit.engines.aliases import aliases_of, merged_aliases
from quantkit.errors import InputError
from quantkit.formats import inventory
from quantkit.formats.base import Declaration, LayerSpec, Problem, QuantWeight, TensorSpec
from quantkit.formats.inventory import Parts
from quantkit.formats.packing import unpack_words, words_for

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

NAME = "gptq"
SIDE_FILE = "quantize_config.json"
PACKINGS = ("gptq", "gptq_v2")
FLOATS = ("F16", "BF16", "F32")

_ELEMENTS: dict[int, Element] = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether config.json says `quant_method: gptq`, or only quantize_config.json exists."""
    config = checkpoint.quantization_config
    if config is not None:
        return config.get("quant_method") == NAME
    side = checkpoint.documents.get(SIDE_FILE)
    return side is not None and side.get("quant_method", NAME) == NAME


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`; config.json and quantize_config.json disagreeing is a Problem.

    Linear layers of decoder blocks are declared; routers, towers and the output head are so only
    where the configuration or the tensors say it.
    """
    side = checkpoint.documents.get(SIDE_FILE)
    config = checkpoint.quantization_config or side or {}
    packing = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if packing not in PACKINGS:
        raise InputError(
            f"GPTQ checkpoint_format {packing!r} is not supported.",
            hint=f"supported: {', '.join(PACKINGS)}; export the model again in one of them",
            code="format.unsupported",
        )
    found = inventory.take(checkpoint, quant_suffixes())
    dynamic: Mapping[str, Any] = config.get("dynamic") or {}
    listed = _flatten(config.get("modules_in_block_to_quantize"))
    rules = [(rule, compiled(rule.removeprefix("+:").removeprefix("-:"), rule)) for rule in dynamic]

    def rule_of(name: str) -> str | None:
        return next((rule for rule, pattern in rules if pattern.match(name)), None)

    def ignored_by(name: str) -> str | None:
        rule = rule_of(name)
        return rule if rule is not None and rule.startswith("-:") else None

    def settings(name: str) -> Mapping[str, Any]:
        rule = rule_of(name)
        return {**config, **(dynamic[rule] if rule is not None else {})}

    def unpacked(name: str, parts: Parts) -> tuple[int, ...] | None:
        if "qweight" not in parts:
            return parts["weight"].shape if "weight" in parts else None
        words, columns = parts["qweight"].shape[-2:]
        return (columns, words * 32 // int(settings(name).get("bits", 4)))

    def target(module: Module) -> LayerSpec | None:
        stored = "qweight" in found.modules[module.name]
        head = module.kind == "head" and bool(config.get("lm_head"))
        if listed and not any(part in module.name for part in listed):
            return None
        if not (head or in_block(module, stored)):
            return None
        number = read_number(settings(module.name))
        return LayerSpec(
            scheme_for(number, None), packing, (module.shape[0], module.shape[1])
        )  # fmt: skip

    modules = [
        m for m in inventory.linears(found, checkpoint.config, unpacked) if len(m.shape) == 2
    ]
    layers, ignored, undeclared = inventory.sort_modules(modules, ignored_by, target)
    names = found.holders | aliases_of(found.holders, checkpoint.config) if dynamic else ()
    used = {rule_of(name) for name in names}
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        unmatched=tuple(rule for rule in dynamic if rule.startswith("-:") and rule not in used),
        problems=_contradictions(config, side),
    )


def in_block(module: Module, stored_quantized: bool) -> bool:
    """Whether a layout that quantizes "the linear layers of the blocks" means this module."""
    if module.kind in ("head", "embedding"):
        return False
    return stored_quantized or (module.kind == "linear" and layer_index(module.name) is not None)


def read_number(settings: Mapping[str, Any]) -> NumberFormat:
    """Bits, group size and symmetry → the number format of the weights."""
    bits = int(settings.get("bits", 4))
    if bits not in _ELEMENTS:
        raise InputError(
            f"{bits}-bit integer weights are not supported.",
            hint=f"supported: {', '.join(map(str, _ELEMENTS))} bits",
            code="format.unsupported",
        )
    group_size = int(settings.get("group_size", 128))
    symmetric = bool(settings.get("sym", True))
    if group_size <= 0:
        return NumberFormat(_ELEMENTS[bits], "channel", symmetric=symmetric)
    return NumberFormat(_ELEMENTS[bits], "group", group_size=group_size, symmetric=symmetric)


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`; `g_idx` may be left out where groups are contiguous."""
    rows, columns = spec.shape
    bits = spec.scheme.weight.bits
    groups = spec.scheme.weight.scale_shape(spec.shape)[1]
    return {
        "qweight": TensorSpec("weight", ("I32",), ((words_for(columns, bits), rows),)),
        "qzeros": TensorSpec("zero_point", ("I32",), ((groups, words_for(rows, bits)),)),
        "scales": TensorSpec("scale", FLOATS, ((groups, rows),)),
        "g_idx": TensorSpec("group_index", ("I32",), ((columns,),), False),
        "bias": TensorSpec("bias", FLOATS, ((rows,),), False),
    }


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return frozenset({"qweight", "qzeros", "scales", "g_idx"})


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`; codes are unsigned, `g_idx` is kept where it is not contiguous."""
    import torch

    rows, columns = spec.shape
    number = spec.scheme.weight
    words = tensors["qweight"].T.contiguous()
    zeros = unpack_words(tensors["qzeros"], number.bits, rows).T
    if spec.packing == "gptq":
        zeros = (zeros + 1) & ((1 << number.bits) - 1)
    g_idx = tensors.get("g_idx")
    if g_idx is not None and torch.equal(g_idx.int(), _contiguous(number, columns)):
        g_idx = None
    return QuantWeight(
        format=number,
        q=unpack_words(words, number.bits, columns),
        scale=tensors["scales"].T.float().contiguous(),
        zero_point=zeros.float().contiguous(),
        g_idx=g_idx,
        bias=tensors.get("bias"),
    )


def quantization_config(layers: Mapping[str, LayerSpec], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` (and quantize_config.json) of a checkpoint with these layers.

    The most common number format is the default, the others and the ignored layers of the blocks
    become `dynamic` rules. A group that engines merge is also named by its merged name.
    """
    specs = list(layers.values())
    common = max(specs, key=lambda spec: sum(s.scheme == spec.scheme for s in specs))
    kept = [name for name in ignore if layer_index(name) is not None]
    merged = merged_aliases(kept)
    dynamic: dict[str, Any] = {
        f"-:{re.escape(name)}$": {} for name in dict.fromkeys([*kept, *merged])
    }
    others: dict[Scheme, list[str]] = {}
    for name, spec in layers.items():
        if spec.scheme != common.scheme:
            others.setdefault(spec.scheme, []).append(name)
    for scheme, names in others.items():
        for name in [*names, *merged_aliases(names)]:
            dynamic[f"+:{re.escape(name)}$"] = _settings(scheme.weight)
    return {
        **_settings(common.scheme.weight),
        "checkpoint_format": common.packing,
        "desc_act": False,
        "dynamic": dynamic,
        "lm_head": "lm_head" in layers,
        "pack_dtype": "int32",
        "quant_method": NAME,
        "true_sequential": True,
    }


def _settings(number: NumberFormat) -> dict[str, Any]:
    return {
        "bits": number.bits,
        "group_size": number.group_size or -1,
        "sym": number.symmetric,
    }


def _contiguous(number: NumberFormat, columns: int) -> torch.Tensor:
    import torch

    return torch.arange(columns, dtype=torch.int32) // (number.group_size or columns)


def _flatten(listed: Any) -> list[str]:
    if isinstance(listed, str):
        return [listed]
    return [name for entry in listed or () for name in _flatten(entry)]


def _contradictions(
    config: Mapping[str, Any], side: Mapping[str, Any] | None
) -> tuple[Problem, ...]:
    keys = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic")
    return tuple(
        Problem(
            "format.contradiction",
            f"config.json says {key} {config.get(key)!r} and {SIDE_FILE} says {side[key]!r}",
            "export the checkpoint again: engines read one file or the other",
        )
        for key in keys
        if side is not None and key in side and side[key] != config.get(key)
    )
