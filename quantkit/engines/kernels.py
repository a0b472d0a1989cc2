"""Which layouts, schemes and cache formats an engine has kernels for, and on which hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from quantkit.engines.candidate import Candidate, Part
from quantkit.engines.data import Engine, FormatRule, SchemeRule
from quantkit.engines.gpus import Gpu
from quantkit.engines.names import Layer
from quantkit.engines.reasons import Reason


def check_format(engine: Engine, candidate: Candidate, gpu: Gpu | None) -> Iterator[Reason]:
    """Reasons of codes `engine.layout`, `engine.kv_cache`, `engine.act_order` and `engine.gpu`,
    against the checkpoint as a whole."""
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
    settings = candidate.settings
    if not rule.act_order and settings.get("desc_act") and settings.get("group_size", -1) != -1:
        yield Reason(
            "engine.act_order",
            f"{engine.name} loads no GPTQ checkpoint with desc_act (columns out of order)",
            "--set options.desc_act=false, or --set options.act_group_aware=true",
        )


def check_schemes(
    engine: Engine, candidate: Candidate, layers: Sequence[Layer], gpu: Gpu | None
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


def _check_layer(
    engine: Engine, layout: str, rule: FormatRule, layer: Layer, part: Part, gpu: Gpu | None
) -> Iterator[Reason]:
    assert part.scheme is not None
    name, weight = part.rule_name(layout), part.scheme.weight
    scheme = rule.schemes.get(name)
    known = ", ".join(rule.schemes)

    def reason(code: str, message: str, fix: str) -> Reason:
        return Reason(code, f"{engine.name} {message} ({layer.name})", fix, layer.name)

    if scheme is None:
        yield reason(
            "engine.scheme", f"has no kernel for {name} in the layout {layout}", f"one of: {known}"
        )
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
        nearest = max((g for g in groups if g < size), default=groups[0])
        message = f"has no {name} kernel for group size {size}"
        yield reason("engine.group_size", message, f"--set group_size={nearest}")
    if not weight.symmetric and scheme.symmetric in (True, part.packing.removesuffix("_v2")):
        message = f"has no kernel for {name} with zero points"
        yield reason("engine.asymmetric", message, "--set symmetric=true")
    if gpu is not None:
        yield from _check_gpu(reason, name, scheme, gpu)


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
    engine: Engine, candidate: Candidate, rule: FormatRule, gpu: Gpu | None
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


def weight_only_note(
    engine: Engine, candidate: Candidate, layers: Sequence[Layer], gpu: Gpu | None
) -> str | None:
    """What to know where the kernels of a GPU leave activations in 16 bit, or None."""
    rule = engine.formats.get(candidate.layout)
    if gpu is None or rule is None or gpu.vendor != "nvidia":
        return None
    for layer in layers:
        part = layer.parts[0]
        if part.scheme is None:
            continue
        name = part.rule_name(candidate.layout)
        scheme = rule.schemes.get(name)
        if scheme and scheme.native > gpu.capability >= scheme.sm:
            return (
                f"{engine.name} runs {name} on {gpu.name} weight-only (native from compute "
                f"capability {scheme.native / 10:g}): memory is saved, the matrix products are "
                "in 16 bit"
            )
    return None
