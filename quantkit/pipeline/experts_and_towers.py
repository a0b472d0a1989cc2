"""Models that are more than a dense language model: which library takes what, from the headers."""

from __future__ import annotations

from quantkit.backends.registry.mixtures import mixture_refusal
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.config import expert_count
from quantkit.checkpoint.network.tensor_names import left_out
from quantkit.errors import InputError, command
from quantkit.pipeline.plan import Plan
from quantkit.recipe.load import recipe_files


def refuse_beyond_dense(checkpoint: Checkpoint, plan: Plan, model: str) -> None:
    """InputError (`plan.architecture`) for towers, and for experts that the library does not take;
    the hint plans `model` without it."""
    if not plan.backend.dense_only:
        return
    found = _tower(checkpoint)
    if found:
        raise _refusal(
            checkpoint, plan, model,
            f"{found}; {plan.backend.name} quantizes language models without one here",
        )  # fmt: skip
    experts = _experts(checkpoint)
    reason = mixture_refusal(plan.backend, plan.recipe, plan.layers, checkpoint.config)
    if experts and reason:
        raise _refusal(checkpoint, plan, model, f"{experts}; {reason}")


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
