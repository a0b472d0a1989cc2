"""A plan as the engines will see its result: the settings that will be written, without weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.network.expert_layout import upright
from quantkit.checkpoint.network.fused_experts import fused_layer
from quantkit.checkpoint.network.modules import Module, block_names, layer_index, linear_modules
from quantkit.checkpoint.schemes import Scheme
from quantkit.engines import LayerPart, Loadable, Verdict, engines, gpu_named, judge
from quantkit.engines.aliases import expanded
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec
from quantkit.formats.registry import packing, writer_named

if TYPE_CHECKING:
    from quantkit.checkpoint.directory import Checkpoint
    from quantkit.pipeline.plan import Plan

_WRITERS = ("compressed-tensors", "gptq", "awq")


def ignore_list(source: Checkpoint, kept: Mapping[str, str]) -> list[str]:
    """The ignore list of a checkpoint: what stays in 16 bit, by every engine's names for it.

    A tied output head has no tensor but is a module of the engines, so it is always there.
    """
    modules = linear_modules(source.modules)
    names = [m.name for m in modules if m.name in kept and m.kind != "embedding"]
    heads = [m.name for m in modules if m.kind == "head"]
    return expanded(names if heads else [*names, "lm_head"], source.config)


def planned(source: Checkpoint, plan: Plan) -> Loadable:
    """The checkpoint that a plan will write, as far as an engine's rules look at it."""
    method = plan.method
    modules = linear_modules(source.modules)
    parts = {part.name: part for m in modules for part in _parts(m, plan, source)}
    settings = _settings(source, plan, [part for part in parts.values() if part.scheme])
    cache = plan.recipe.kv_cache
    scales = _kv_scales(method.layout, plan.layers) if cache != "none" else ()
    return Loadable(source.config, method.layout, settings, parts, cache, scales)


def verdicts(source: Checkpoint, plan: Plan) -> list[Verdict]:
    """What each engine × tensor-parallel size of the recipe, or else every known engine on one
    device, will do with the result."""
    serve = plan.recipe.serve
    gpu = gpu_named(serve.gpu) if serve.gpu else None
    return judge(planned(source, plan), serve.engines or list(engines()), serve.tp, gpu)


def check_engines(source: Checkpoint, plan: Plan) -> Plan:
    """The plan, with notes on engines that read its layout and yet will not load its result, or
    have no rules for the model.

    Raises InputError (`plan.engine`) when an engine that the recipe asks for will not.
    """
    found = verdicts(source, plan)
    if refusal := engine_refusal(source, plan, found):
        raise refusal
    reading = [v for v in found if v.engine in plan.loads.engines]
    refusing = [v for v in reading if v.refuses]
    doubtful = [v for v in reading if v.unknown and not v.refuses]
    notes = [f"{v.title}: {v.reasons[0].text}" for v in refusing]
    notes += [f"{v.title}: {v.unknown}" for v in doubtful]
    notes += [caveat for v in reading for caveat in v.caveats]
    loads = replace(
        plan.loads,
        refusing=tuple(dict.fromkeys(v.engine for v in refusing)),
        unknown=tuple(dict.fromkeys(v.engine for v in doubtful)),
    )
    return replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *notes))), loads=loads)


def _kv_scales(layout: str, names: Iterable[str]) -> tuple[str, ...]:
    """What the library of a layout calls the scales of the cache: below the projection (ModelOpt)
    or beside it (compressed-tensors)."""
    projections = [name for name in names if name.endswith((".k_proj", ".v_proj"))]
    if layout == "modelopt":
        return tuple(f"{name}.{name[-6]}_scale" for name in projections)
    return tuple(f"{name[:-6]}{name[-6]}_scale" for name in projections)


def engine_refusal(source: Checkpoint, plan: Plan, found: Sequence[Verdict]) -> InputError | None:
    """Why an engine that the recipe asks for will not load the result, None where none refuses."""
    refused = [v for v in found if v.refuses]
    if not plan.recipe.serve.engines or not refused:
        return None
    return InputError(
        f"{plan.recipe.name} on {source.path.name}: "
        + "; ".join(f"{v.title}: {v.reasons[0].text}" for v in refused[:3])
        + ".",
        hint="; ".join(dict.fromkeys(v.reasons[0].fix for v in refused[:3])),
        code="plan.engine",
    )


def _parts(module: Module, plan: Plan, source: Checkpoint) -> list[LayerPart]:
    """The module as it will be written: quantized experts one by one, where the layout has them
    so."""
    scheme = plan.layers.get(module.name)
    variant = "" if scheme is None else _packing(scheme, plan)
    shape = upright(module.tensor, module.shape, source)
    fused = fused_layer(module.name)
    if scheme is None or fused is None or len(shape) < 3 or plan.method.layout not in _WRITERS:
        return [LayerPart(module.name, module.kind, shape, scheme, variant)]
    experts, rows, columns = shape
    one = (rows // len(fused.leaves), columns)
    names = (name for expert in range(experts) for name in fused.names(expert))
    return [LayerPart(name, "linear", one, scheme, variant) for name in names]


def _packing(scheme: Scheme, plan: Plan) -> str:
    """The variant of the layout, or the library's algorithm where rules go by that."""
    method = plan.method
    if method.layout in _WRITERS:
        return packing(scheme, method.layout)
    if method.layout == "auto-round":
        return "gptq" if scheme.weight.symmetric else "gptq_v2"
    return method.algorithm


def _settings(source: Checkpoint, plan: Plan, quantized: list[LayerPart]) -> dict[str, Any]:
    """The quantization settings as the method's library, or the built-in writer, will say them."""
    layout, ignore = plan.method.layout, ignore_list(source, plan.kept)
    if layout in _WRITERS:
        specs = {
            part.name: LayerSpec(part.scheme, part.packing, (part.rows, part.columns))
            for part in quantized
            if part.scheme
        }
        settings = writer_named(layout).quantization_config(specs, ignore)
        return _with_order(settings, plan.recipe.options)
    weight = plan.recipe.resolved_scheme().weight
    if layout == "modelopt":
        return {"quant_method": layout, "quant_algo": plan.method.algorithm, "ignore": ignore}
    if layout == "auto-round":
        inside = [name for name in ignore if layer_index(name) is not None]
        return {
            "quant_method": layout,
            "bits": weight.bits,
            "group_size": weight.group_size or -1,
            "sym": weight.symmetric,
            "extra_config": {name: {"bits": 16} for name in inside},
            "block_name_to_quantize": ",".join(block_names(plan.layers)),
        }
    if layout == "ascend":
        types = dict.fromkeys(ignore, "FLOAT")
        types |= {part.name: plan.method.algorithm for part in quantized}
        return {f"{name}.weight": kind for name, kind in types.items()}
    return {}


def _with_order(settings: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the order of columns that the recipe's options ask a library for."""
    if options.get("desc_act") and "desc_act" in settings:
        settings["desc_act"] = True
    algorithm, order = options.get("algorithm"), options.get("actorder")
    for group in settings.get("config_groups", {}).values():
        weights = group["weights"]
        by_gptq = algorithm == "gptq" or (algorithm is None and weights["type"] == "int")
        if order not in (None, "none") and by_gptq and weights["strategy"] == "group":
            weights["actorder"] = order
    return settings
