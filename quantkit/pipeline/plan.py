"""The preflight: which module gets which scheme, what is refused, what it will cost.

Reads config and headers only, no weights; imports neither torch nor transformers.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path

from quantkit.backends.registry import Backend, Method, backend_named
from quantkit.backends.registry.refusals import refusals
from quantkit.checkpoint.consistency import refuse_contradictions
from quantkit.checkpoint.directory import DTYPE_BITS, Checkpoint
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.fp8_blocks import INVERSE_SCALE, states_blocks
from quantkit.checkpoint.network.fused_experts import fused_layer
from quantkit.checkpoint.network.modules import (
    Module,
    expert_groups,
    fused_groups,
    linear_modules,
    named_by,
    names_embedding,
)
from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.engines import Support, support
from quantkit.errors import InputError
from quantkit.formats.registry import is_quantized
from quantkit.formats.stale_settings import refuse_conflict, refuse_stale
from quantkit.pipeline.placement import Placed
from quantkit.pipeline.plan_notes import notes_of
from quantkit.recipe.model import Override, Recipe, adjusted

GROUP_SIZES = (256, 128, 64, 32, 16)
_OTHER_EXPERTS = "experts in a form that no layout here holds"
METHODS_HINT = "quantkit methods  # what each method writes and needs"
_DEQUANTIZING = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""quant_method → the class of Transformers 5.17 that dequantizes it on loading."""


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes. `output` is exact but for headers; `memory` is a rule of thumb: the source
    in 16 bit plus a third for activations and statistics."""

    source: int
    output: int
    memory: int
    disk: int


@dataclass(frozen=True)
class Plan:
    """What will be done to every module that a scheme could apply to."""

    recipe: Recipe
    backend: Backend
    layers: Mapping[str, Scheme]
    kept: Mapping[str, str]
    """Module → why it stays in 16 bit."""
    notes: tuple[str, ...]
    estimate: Estimate
    bits_per_weight: float
    """Stored bits a weight, over the quantized layers."""
    loads: Support
    """Who reads the result, as far as it is known without the engines' rules for shapes."""
    placed: Placed | None = None
    """Where the weights will lie on the devices that were asked for; None where none were."""

    @property
    def method(self) -> Method:
        return self.backend.method(self.recipe)


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    state: bool = False,
) -> Plan:
    """Decide for every module, or raise one InputError with every reason against the job.

    `state` asks for the fake-quantized state to be kept (`--checkpoint-save`).
    """
    backend = backend_named(recipe.backend)
    scheme = recipe.resolved_scheme()
    reasons = refusals(backend, recipe, scheme, device)
    if state and not backend.saves_state:
        reasons.append(f"{backend.name} has no state to save; leave out --checkpoint-save")
    known = scheme.name in backend.methods
    if recipe.calibration is None and known and backend.method(recipe).calibrated:
        reasons.append(f"{recipe.name} needs calibration, but the recipe has none")
    refuse_conflict(checkpoint)
    refuse_stale(checkpoint)
    found = is_quantized(checkpoint)
    if found and not (backend.reads_fp8_blocks and _in_fp8_blocks(checkpoint)):
        readable = "; rtn_* reads it" if _in_fp8_blocks(checkpoint) else ""
        start = f"; start from its 16-bit original{readable}"
        reasons.append(f"the model is quantized already ({found}){start}")
    if family(checkpoint.config).transposed:
        reasons.append(
            f"{checkpoint.config['model_type']} stores its linear layers transposed (Conv1D), "
            "which no layout here holds"
        )
    code = _needs_remote_code(checkpoint)
    if code and not trust_remote_code:
        reasons.append(f"{code}; read that code, then pass --trust-remote-code")
    if reasons:
        hint = _other_start(checkpoint, scheme) if found else METHODS_HINT
        raise _refusal(checkpoint.path, recipe, reasons, hint)
    refuse_contradictions(checkpoint)
    return _assign(checkpoint, recipe, scheme, linear_modules(checkpoint.modules))


def _assign(checkpoint: Checkpoint, recipe: Recipe, scheme: Scheme, modules: list[Module]) -> Plan:
    layers: dict[str, Scheme] = {}
    kept = _unlisted(checkpoint, modules)
    asked: dict[str, Scheme] = {}
    misfits: dict[str, str] = {}
    for module in modules:
        chosen = _choose(module, recipe, scheme)
        if isinstance(chosen, str):
            kept[module.name] = chosen
            continue
        asked[module.name] = chosen
        misfit = _misfit(module, chosen)
        fit = fitted(module, chosen) if recipe.on_misfit == "fit" else None
        if misfit is None or fit:
            layers[module.name] = fit or chosen
        else:
            misfits[module.name] = misfit
    if recipe.on_misfit == "keep16":
        kept |= _kept_misfits(misfits, asked)
        layers = {name: chosen for name, chosen in layers.items() if name not in kept}
        misfits = {}
    _fit_experts_alike(layers, asked)
    notes = [
        f"{name}: group size {found.weight.group_size} instead of {asked[name].weight.group_size}"
        for name, found in layers.items()
        if found != asked[name]
    ]
    if misfits:
        wanted = [m for m in modules if m.name in misfits or m.name in layers]
        size = _common_size(wanted, [_choose(module, recipe, scheme) for module in wanted])
        raise _misfit_error(checkpoint.path, recipe, misfits, size)
    if not layers:
        raise _refusal(
            checkpoint.path,
            recipe,
            [f"no module is left to quantize (targets {recipe.targets}, ignore {recipe.ignore})"],
        )
    _refuse_unused_entries(recipe, modules)
    _refuse_split_groups(recipe, modules, layers)
    notes += notes_of(checkpoint, backend_named(recipe.backend), layers)
    notes += checkpoint.notes
    return plan_of_layers(checkpoint, recipe, layers, kept, tuple(notes))


def plan_of_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Mapping[str, Scheme],
    kept: Mapping[str, str],
    notes: tuple[str, ...],
) -> Plan:
    """A plan whose assignment is known, with its sizes."""
    backend = backend_named(recipe.backend)
    method = backend.method(recipe)
    loads = support(method.layout, method.algorithm, recipe.scheme)
    if loads.export_only:
        notes = (*notes, loads.describe())
    modules = [m for m in checkpoint.modules if m.name in layers]
    bits = sum(_bits(m.shape, layers[m.name]) for m in modules)
    replaced = {module.tensor for module in modules}
    estimate = _estimate(checkpoint, replaced, round(bits / 8))
    per_weight = bits / sum(prod(module.shape) for module in modules)
    return Plan(recipe, backend, layers, kept, notes, estimate, per_weight, loads)


def _choose(module: Module, recipe: Recipe, scheme: Scheme) -> Scheme | str:
    override = _override(module, recipe)
    if override:
        if override.scheme == "keep":
            return f"override {override.match}"
        return adjusted(SCHEMES[override.scheme], override.group_size, recipe.symmetric)
    if named_by(module, recipe.targets) is None:
        return f"{module.kind}, not in targets"
    entry = named_by(module, recipe.ignore)
    if not entry and module.kind == "tower" and len(module.shape) != 2:
        return "no linear layer"
    if not entry and module.kind == "tower" and names_embedding(module.name):
        return "an embedding of a tower"
    if not entry and module.kind == "experts" and fused_layer(module.name) is None:
        return _OTHER_EXPERTS
    return f"ignore {entry}" if entry else scheme


def _unlisted(checkpoint: Checkpoint, modules: list[Module]) -> dict[str, str]:
    """Weights that no scheme could apply to, by name, and why: convolutions, tables, parameters."""
    linear = {module.tensor for module in modules}
    return {
        name.removesuffix(".weight"): _OTHER_EXPERTS if ".experts." in name else "no linear layer"
        for name, info in checkpoint.tensors.items()
        if len(info.shape) > 1 and name not in linear and not name.endswith((INVERSE_SCALE, "bias"))
    }


def kept_layers(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """The linear layers that stay in 16 bit, in alphabetical order."""
    return sorted(m.name for m in linear_modules(checkpoint.modules) if m.name in plan.kept)


def _override(module: Module, recipe: Recipe) -> Override | None:
    matching = (o for o in recipe.overrides if named_by(module, [o.match]))
    return next(matching, None)


def _misfit(module: Module, scheme: Scheme) -> str | None:
    """Why the module's shape cannot hold the scheme, or None."""
    group, columns = scheme.weight.group_size, module.shape[-1]
    if group is None or columns % group == 0:
        return None
    fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
    return (
        f"{module.name} {list(module.shape)}: group size {group} does not divide {columns} "
        f"(would fit: {', '.join(fitting) or 'none'})"
    )


def fitted(module: Module, scheme: Scheme) -> Scheme | None:
    """The scheme as `on_misfit=fit` gives it to the module: in smaller groups where its own do not
    divide the columns; None where no group size does."""
    if _misfit(module, scheme) is None:
        return scheme
    size = _fitting(module, scheme)
    return scheme.with_weight(group_size=size) if size else None


def _fitting(module: Module, scheme: Scheme) -> int | None:
    group = scheme.weight.group_size or 0
    fixed = scheme.weight.scale != "float"
    sizes = (s for s in GROUP_SIZES if s < group and module.shape[-1] % s == 0)
    return None if fixed else next(sizes, None)


def _kept_misfits(misfits: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """What stays in 16 bit and why: misfits, and the other experts of their layer."""
    found = dict(misfits)
    for members in expert_groups(names):
        if why := next((misfits[name] for name in members if name in misfits), None):
            found |= {name: misfits.get(name, why) for name in members}
    return found


def _fit_experts_alike(layers: dict[str, Scheme], asked: Mapping[str, Scheme]) -> None:
    """Give all experts of a layer that were asked to be alike the smallest group size that any of
    them needs."""
    for members in expert_groups(layers):
        if len({asked[name] for name in members}) == 1:
            least = min((layers[name] for name in members), key=lambda s: s.weight.group_size or 0)
            layers |= dict.fromkeys(members, least)


def _common_size(modules: list[Module], schemes: list[Scheme | str]) -> int | None:
    """The largest group size that fits every module, None where none does or formats fix it."""
    if any(isinstance(s, Scheme) and s.weight.scale != "float" for s in schemes):
        return None
    columns = [module.shape[-1] for module in modules]
    return next((s for s in GROUP_SIZES if all(length % s == 0 for length in columns)), None)


def _refuse_unused_entries(recipe: Recipe, modules: list[Module]) -> None:
    listed = (*recipe.targets, *recipe.ignore)
    entries = [entry for entry in listed if not entry.startswith("@")]
    entries += [override.match for override in recipe.overrides]
    unused = [e for e in entries if not any(named_by(module, [e]) for module in modules)]
    if unused:
        raise InputError(
            f"{recipe.name}: {', '.join(unused)} matches none of the model's "
            f"{len(modules)} linear modules (the first is {modules[0].name}).",
            hint="correct or remove the entry; names as in the checkpoint, globs, or re:REGEX",
            code="plan.unmatched_entry",
        )


def _refuse_split_groups(
    recipe: Recipe, modules: list[Module], layers: Mapping[str, Scheme]
) -> None:
    """Engines merge q/k/v and gate/up into one layer, which has one scheme or none."""
    for group in fused_groups([module.name for module in modules]):
        chosen = {name: layers.get(name) for name in group}
        if len(set(chosen.values())) > 1:
            told = ", ".join(f"{name}: {s.name if s else '16 bit'}" for name, s in chosen.items())
            raise InputError(
                f"{recipe.name} gives different schemes to layers that engines merge into one "
                f"({told}).",
                hint="name all of them in the override, target or ignore entry, or none",
                code="plan.split_group",
            )


def _bits(shape: tuple[int, ...], scheme: Scheme) -> float:
    return scheme.weight.bits_per_weight((shape[-2], shape[-1])) * prod(shape)


def _estimate(checkpoint: Checkpoint, replaced: set[str], quantized: int) -> Estimate:
    infos = checkpoint.tensors.values()
    kept = sum(info.bytes for info in infos if info.name not in replaced)
    in_16_bit = sum(info.elements * min(16, DTYPE_BITS[info.dtype]) // 8 for info in infos)
    output = kept + quantized
    disk = round(output * 1.02) + 32_000_000
    return Estimate(checkpoint.weight_bytes, output, round(in_16_bit * 4 / 3), disk)


def _in_fp8_blocks(checkpoint: Checkpoint) -> bool:
    settings = checkpoint.quantization_config or {}
    return settings.get("quant_method") == "fp8" and states_blocks(checkpoint.config)


def _other_start(checkpoint: Checkpoint, scheme: Scheme) -> str:
    """The command that leads on from a quantized source: a method that reads it, or Transformers,
    which writes its 16-bit weights."""
    if _in_fp8_blocks(checkpoint):
        four = scheme.weight.bits < 8
        name = "rtn_nvfp4a16" if scheme.weight.element == "fp4_e2m1" else "rtn_w4a16"
        method = [name, "--set", "on_misfit=fit"] if four else ["rtn_fp8_dynamic"]
        return shlex.join(["quantkit", "plan", str(checkpoint.path), "--method", *method])
    method_of = (checkpoint.quantization_config or {}).get("quant_method")
    config = _DEQUANTIZING.get(str(method_of))
    if config is None:
        return METHODS_HINT
    there = f"{checkpoint.path}-bf16"
    code = (
        f"from transformers import AutoModelForCausalLM as M, {config} as C; "
        f"M.from_pretrained({str(checkpoint.path)!r}, quantization_config=C(dequantize=True), "
        f"dtype='bfloat16').save_pretrained({there!r})"
    )
    return f"{shlex.join(['python', '-c', code])}  # and copy the tokenizer's files there"


def _needs_remote_code(checkpoint: Checkpoint) -> str | None:
    """Why the architecture cannot be loaded without code from the checkpoint, or None."""
    auto_map = checkpoint.config.get("auto_map")
    if not auto_map:
        return None
    model_type = str(checkpoint.config.get("model_type", ""))
    spec = find_spec("transformers")
    if spec and spec.origin and model_type:
        models = Path(spec.origin).parent / "models"
        if (models / model_type.replace("-", "_")).is_dir():
            return None
    return f"the architecture {model_type or 'in config.json'} needs code from the checkpoint"


def _refusal(
    path: Path, recipe: Recipe, reasons: list[str], hint: str = METHODS_HINT
) -> InputError:
    return InputError(
        f"{recipe.name} cannot be applied to {path}: " + "; ".join(reasons) + ".",
        hint=hint,
        code="plan.refused",
    )


def _misfit_error(
    path: Path, recipe: Recipe, misfits: Mapping[str, str], size: int | None
) -> InputError:
    told = list(misfits.values())
    shown = "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")
    leaves = sorted({name.rpartition(".")[2] for name in misfits})
    hint = f"--set group_size={size} (a size that fits), or --set on_misfit=keep16 or =fit"
    if size is None:
        ignored = " ".join(f"--set 'ignore+=*.{leaf}'" for leaf in leaves)
        hint = f"{ignored}, or --set on_misfit=keep16: these layers then stay in 16 bit"
    return InputError(
        f"{recipe.name} cannot be applied to {path}: {shown}.",
        hint=hint,
        code="plan.group_size",
    )
