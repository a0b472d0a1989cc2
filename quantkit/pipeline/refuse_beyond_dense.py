"""Models that are more than a dense language model: which library takes what, from the headers."""

from __future__ import annotations

from quantkit.backends.registry.mixtures import family_refusal, mixture_refusal
from quantkit.backends.registry.towers import tower_refusal
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.config import expert_count
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.modules import layer_index
from quantkit.checkpoint.network.tensor_names import left_out
from quantkit.errors import InputError, command
from quantkit.pipeline.calibration_data import mixture_asked
from quantkit.pipeline.plan import Plan
from quantkit.recipe.load import recipe_files


def refuse_beyond_dense(checkpoint: Checkpoint, plan: Plan, model: str) -> None:
    """InputError (`plan.architecture`) for towers, experts and classes of layers that the library
    does not take; the hint plans `model` without it."""
    if not plan.backend.dense_only:
        return
    if family(checkpoint.config).own_linear:
        raise _refusal(
            checkpoint, plan, model,
            f"linear layers of a class of its own ({checkpoint.config['model_type']}), which "
            f"{plan.backend.distribution} leaves in 16 bit",
        )  # fmt: skip
    found = _tower(checkpoint)
    reason = tower_refusal(plan.backend, plan.recipe, checkpoint.config)
    if found and reason:
        raise _refusal(checkpoint, plan, model, f"{found}; {reason}")
    _refuse_unseen_layers(checkpoint, plan)
    experts = _experts(checkpoint)
    reason = mixture_refusal(plan.backend, plan.recipe, plan.layers, checkpoint.config)
    if experts and reason:
        raise _refusal(checkpoint, plan, model, f"{experts}; {reason}")
    if reason := family_refusal(plan.backend, plan.recipe, checkpoint.config):
        raise _refusal(checkpoint, plan, model, f"layers that the library cannot take; {reason}")


def _refuse_unseen_layers(checkpoint: Checkpoint, plan: Plan) -> None:
    """InputError (`plan.unseen_layers`) for layers that a model computes only where a text comes
    with pictures: they would be calibrated with nothing."""
    outside = {m.name for m in checkpoint.modules if m.kind == "tower"}
    across = set(text_config(checkpoint.config).get("cross_attention_layers") or ())
    unseen = [name for name in plan.layers if name in outside or layer_index(name) in across]
    shown = mixture_asked(plan) if unseen else None
    if shown is None or shown.has_pictures:
        return
    ignored = "--set 'ignore+=@towers'"
    if unseen[0] not in outside:
        numbers = "|".join(str(index) for index in sorted(across))
        ignored = f"--set 'ignore+=re:.*layers\\.({numbers})\\..*'"
    raise InputError(
        f"{plan.recipe.name} would quantize {len(unseen)} layers that calibration texts do not "
        f"reach, {unseen[0]} the first.",
        hint=f"{ignored} keeps them in 16 bit",
        code="plan.unseen_layers",
    )


def _refusal(checkpoint: Checkpoint, plan: Plan, model: str, what: str) -> InputError:
    streamed = f"rtn_{plan.recipe.scheme}"
    method = streamed if streamed in recipe_files() else "rtn_fp8_dynamic"
    instead = command("plan", model, "--method", method)
    return InputError(
        f"{checkpoint.path} has {what}.",
        hint=f"{instead}  # rtn_* methods need no model class",
        code="plan.architecture",
    )


def _experts(checkpoint: Checkpoint) -> str | None:
    """The mixture of experts that the model is, None for a dense one."""
    if experts := expert_count(checkpoint.config):
        return f"{experts} experts a layer"
    for module in checkpoint.modules:
        if module.kind == "experts" or ".experts." in module.name:
            return f"a mixture of experts ({module.name})"
    return None


def _tower(checkpoint: Checkpoint) -> str | None:
    for module in checkpoint.modules:
        if module.kind == "tower":
            return f"a vision or audio tower ({module.name})"
    towers = left_out(checkpoint.config) if checkpoint.derived == "config.json" else []
    return next((f"a {kind}" for kind in towers if "tower" in kind), None)
