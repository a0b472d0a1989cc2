"""Which layouts, schemes and cache formats an engine has kernels for, and on which hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quantkit.checkpoint.network.language import text_config
from quantkit.engines.gpus import Gpu
from quantkit.engines.loadable import LayerPart, Loadable
from quantkit.engines.names import EngineLayer
from quantkit.engines.order import columns_out_of_order
from quantkit.engines.reasons import Reason
from quantkit.engines.rules import EngineFamily, EngineRules, FormatRule, SchemeRule, later


def check_format(engine: EngineRules, candidate: Loadable, gpu: Gpu | None) -> Iterator[Reason]:
    """Reasons of codes `engine.layout`, `engine.kv_cache`, `engine.act_order`, `engine.scheme` and
    `engine.gpu`, against the checkpoint as a whole."""
    rule = engine.formats.get(candidate.layout)
    if rule is None:
        yield Reason(
            "engine.layout",
            f"{engine.name} does not read the layout {candidate.layout}",
            f"export in one of {', '.join(engine.formats)}",
        )
        return
    yield from _check_vendor(engine, candidate, rule, gpu)
    if candidate.kv_cache not in ("none", *rule.kv_cache):
        yield Reason(
            "engine.kv_cache",
            f"{engine.name} loads no {candidate.kv_cache} KV cache from {candidate.layout} "
            f"(it loads {', '.join(rule.kv_cache) or 'none'})",
            f"--set kv_cache={next(iter(rule.kv_cache), 'none')}",
        )
    out_of_order = None if rule.act_order else columns_out_of_order(candidate.settings)
    if out_of_order is not None:
        said, fix = out_of_order
        message = f"{engine.name} loads no checkpoint with columns out of order ({said})"
        yield Reason("engine.act_order", message, fix)
    yield from _check_mixed(engine, candidate, rule)


def _check_mixed(engine: EngineRules, candidate: Loadable, rule: FormatRule) -> Iterator[Reason]:
    """Against a ModelOpt checkpoint with an algorithm a layer."""
    section = candidate.settings.get("quantization") or candidate.settings
    if candidate.layout != "modelopt" or section.get("quant_algo") != "MIXED_PRECISION":
        return
    listed = (section.get("quantized_layers") or {}).values()
    found = {str(entry.get("quant_algo", "")).upper() for entry in listed}
    if rule.mixed is True or (rule.mixed and found.intersection(rule.mixed)):
        return
    needs = f" without a layer in {' or '.join(rule.mixed)}" if rule.mixed else ""
    yield Reason(
        "engine.scheme",
        f"{engine.name} does not read a ModelOpt checkpoint of mixed precision{needs} "
        f"(it holds {', '.join(sorted(found)) or 'none'})",
        "quantize all layers with one algorithm",
    )


def check_schemes(
    engine: EngineRules,
    family: EngineFamily,
    candidate: Loadable,
    layers: Sequence[EngineLayer],
    gpu: Gpu | None,
) -> Iterator[Reason]:
    """Reasons of codes `engine.scheme`, `engine.moe_scheme`, `engine.group_size`,
    `engine.asymmetric`, `engine.packing` and `engine.gpu`, a layer each."""
    rule = engine.formats.get(candidate.layout)
    if rule is None:
        return
    for layer in layers:
        part = layer.parts[0]
        if part.scheme is not None:
            yield from _check_layer(engine, candidate.layout, rule, layer, part, gpu)
            yield from _check_dtype(engine, candidate, rule, layer)
            yield from _check_misread(engine, family, candidate.layout, layer)


def _check_dtype(
    engine: EngineRules, candidate: Loadable, rule: FormatRule, layer: EngineLayer
) -> Iterator[Reason]:
    """SGLang holds the scales of GPTQ experts in float16, and its kernel wants the model's dtype
    (gptq/schemes/gptq_moe.py:239, moe/fused_moe_triton/fused_marlin_moe.py:233 in 0.5.23)."""
    name = layer.parts[0].rule_name(candidate.layout)
    scheme, dtype = rule.schemes.get(name), _dtype(candidate.config)
    if scheme is not None and layer.experts and scheme.moe_dtype not in ("", dtype):
        yield Reason(
            "engine.dtype",
            f"{engine.name} computes experts in {name} of the layout {candidate.layout} in "
            f"{scheme.moe_dtype} alone, and the model is in {dtype} ({layer.name})",
            f"serve it with --dtype {scheme.moe_dtype}, or write compressed-tensors",
            layer.name,
        )


def _dtype(config: Mapping[str, Any]) -> str:
    """The dtype that engines serve a config.json in: as stated, for the whole or for its language
    model; float16 for float32, which is also what none means."""
    inner = text_config(config)
    stated = (one.get(key) for one in (config, inner) for key in ("dtype", "torch_dtype"))
    found = next((name for name in stated if isinstance(name, str)), "float32")
    return "float16" if found == "float32" else found


def _check_misread(
    engine: EngineRules, family: EngineFamily, layout: str, layer: EngineLayer
) -> Iterator[Reason]:
    packing = layer.parts[0].packing
    unknown = family.misread.get(layer.leaf, ())
    if layout in unknown or packing in unknown:
        leaves = [part.name.rpartition(".")[2] for part in layer.parts]
        kind = layout if packing in ("", layout) else f"{layout} ({packing})"
        yield Reason(
            "engine.packing",
            f"{engine.name} takes the weight of {layer.name} apart in the model's own code, which "
            f"does not know {kind}",
            "keep it in 16 bit: " + " ".join(f"--set 'ignore+=re:.*{leaf}'" for leaf in leaves),
            layer.name,
        )


def _check_layer(
    engine: EngineRules,
    layout: str,
    rule: FormatRule,
    layer: EngineLayer,
    part: LayerPart,
    gpu: Gpu | None,
) -> Iterator[Reason]:
    assert part.scheme is not None
    name, weight = part.rule_name(layout), part.scheme.weight
    scheme = rule.schemes.get(name)
    known = ", ".join(rule.schemes)

    def reason(code: str, message: str, fix: str) -> Reason:
        return Reason(code, f"{engine.name} {message} ({layer.name})", fix, layer.name)

    if scheme is None:
        message = f"has no kernel for {name} in the layout {layout}"
        if name in rule.unread:
            message = f"is not known to read {name} in the layout {layout}: {rule.unread[name]}"
        yield reason("engine.scheme", message, f"one of: {known}")
        return
    if rule.packings is not None and part.packing not in rule.packings:
        accepted = ", ".join(rule.packings)
        yield reason("engine.packing", f"does not read the packing {part.packing}", accepted)
    if layer.experts and not scheme.moe:
        able = ", ".join(n for n, s in rule.schemes.items() if s.moe)
        yield reason(
            "engine.moe_scheme", f"has no kernel for experts in {name}",
            f"for experts one of: {able or 'none in this layout'}; or keep them in 16 bit",
        )  # fmt: skip
    if not layer.experts and scheme.moe == "only":
        yield reason(
            "engine.scheme", f"has a kernel for {name} in experts only", "keep this layer in 16 bit"
        )
    size, groups = weight.group_size, scheme.groups
    if groups and size is not None and size not in groups:
        message = f"has no {name} kernel for group size {size}"
        sizes = ", ".join(map(str, groups))
        yield reason("engine.group_size", message, f"one of the group sizes {sizes}, or 16 bit")
    if not weight.symmetric and scheme.symmetric in (True, part.packing.removesuffix("_v2")):
        message = f"has no kernel for {name} with zero points"
        yield reason("engine.asymmetric", message, "--set symmetric=true")
    if gpu is not None:
        yield from _check_gpu(reason, name, scheme, gpu)
    on_amd = gpu is not None and gpu.vendor == "amd" and rule.amd_packings is not None
    if gpu is not None and on_amd and part.packing not in (rule.amd_packings or ()):
        message = f"has no kernel for the packing {part.packing} on {gpu.name}"
        yield reason("engine.gpu", message, "quantkit platforms")


def _check_gpu(
    make: Callable[[str, str, str], Reason], name: str, scheme: SchemeRule, gpu: Gpu
) -> Iterator[Reason]:
    if gpu.vendor == "nvidia" and gpu.capability < scheme.sm:
        needs, has = scheme.sm / 10, gpu.capability / 10
        message = f"needs compute capability {needs:g} for {name}; {gpu.name} has {has:g}"
        yield make("engine.gpu", message, "choose a method for this GPU: quantkit platforms")
    excluded = scheme.amd is False or (isinstance(scheme.amd, tuple) and gpu.key not in scheme.amd)
    if gpu.vendor == "amd" and scheme.amd is not None and excluded:
        yield make("engine.gpu", f"has no kernel for {name} on {gpu.name}", "quantkit platforms")
    if gpu.vendor == "ascend" and scheme.npu is False:
        yield make("engine.gpu", f"has no kernel for {name} on {gpu.name}", "quantkit platforms")


def _check_vendor(
    engine: EngineRules, candidate: Loadable, rule: FormatRule, gpu: Gpu | None
) -> Iterator[Reason]:
    if gpu is None:
        return
    by_scheme = any(isinstance(s.amd, tuple) for s in rule.schemes.values())
    allowed = {"nvidia": rule.nvidia, "amd": rule.amd or by_scheme, "ascend": rule.npu}
    if not allowed[gpu.vendor]:
        yield Reason(
            "engine.gpu",
            f"{engine.name} has no kernels for the layout {candidate.layout} on {gpu.name}",
            "choose a method for this device: quantkit platforms",
        )


def check_scale_names(
    engine: EngineRules, family: EngineFamily, candidate: Loadable, layers: Sequence[EngineLayer]
) -> Iterator[Reason]:
    """Code `engine.scale_names`: FP8 scales, one a tensor, under names that the engine knows for
    some families only; its loader stops at a name that it does not know."""
    rule = engine.formats.get(candidate.layout)
    if rule is None or not rule.scale_names:
        return
    for layer in layers:
        part = layer.parts[0]
        if part.scheme is None or part.scheme.weight.granularity != "tensor":
            continue
        known = {*rule.scale_names, *family.scale_names}
        other = [name for name in part.packing.split("+") if name not in known]
        if other:
            yield Reason(
                "engine.scale_names",
                f"{engine.name} finds no place for the scales of {layer.name}, stored as "
                f"{' and '.join(other)}: for this family it has {' and '.join(rule.scale_names)}",
                "serve it with an engine that renames them (SGLang does for Llama and Mistral)",
                layer.name,
            )


def minimum_version(
    engine: EngineRules, candidate: Loadable, layers: Sequence[EngineLayer], gpu: Gpu | None
) -> str:
    """The oldest release of the engine that has kernels for every layer, on the GPU if one is
    named."""
    oldest = engine.minimum_version
    for layer, rule, _ in _ruled(engine, candidate, layers):
        oldest = later(oldest, later(rule.since, rule.moe_since if layer.experts else ""))
        if gpu is not None and gpu.vendor == "nvidia" and gpu.capability < rule.native:
            oldest = later(oldest, rule.detour_since)
    return oldest


def serving_notes(
    engine: EngineRules, candidate: Loadable, layers: Sequence[EngineLayer], gpu: Gpu | None
) -> Iterator[str]:
    """What to know of the release that is needed, and of how a GPU's kernels compute."""
    oldest = minimum_version(engine, candidate, layers, gpu)
    if oldest != engine.minimum_version:
        yield f"{engine.name} loads it from version {oldest} on"
    if gpu is None or gpu.vendor != "nvidia":
        return
    said: dict[str, None] = {}
    for layer, rule, name in _ruled(engine, candidate, layers):
        if rule.native > gpu.capability >= rule.sm:
            said[
                f"{engine.name} runs {name} on {gpu.name} weight-only (native from compute "
                f"capability {rule.native / 10:g}): memory is saved, the matrix products are "
                "in 16 bit"
            ] = None
        if (served := rule.served.get(gpu.capability)) and not layer.experts:
            variables = " ".join(f"{name}={value}" for name, value in served.unless.items())
            said[
                f"{engine.name} serves {name} on {gpu.name} {served.note}; {variables} keeps them "
                "as they are"
            ] = None
    yield from said


def environment(
    engine: EngineRules, candidate: Loadable, layers: Sequence[EngineLayer], gpu: Gpu | None
) -> dict[str, str]:
    """Variables with which the engine serves a checkpoint better on a GPU than by default."""
    if gpu is None or gpu.vendor != "nvidia":
        return {}
    served = (
        rule.served[gpu.capability]
        for layer, rule, _ in _ruled(engine, candidate, layers)
        if gpu.capability in rule.served and not layer.experts
    )
    return {name: value for one in served for name, value in one.unless.items()}


def _ruled(
    engine: EngineRules, candidate: Loadable, layers: Sequence[EngineLayer]
) -> Iterator[tuple[EngineLayer, SchemeRule, str]]:
    """The quantized layers that have a rule, with it and the name it goes by."""
    found = engine.formats.get(candidate.layout)
    for layer in layers:
        part = layer.parts[0]
        if found is not None and part.scheme is not None:
            name = part.rule_name(candidate.layout)
            if name in found.schemes:
                yield layer, found.schemes[name], name
