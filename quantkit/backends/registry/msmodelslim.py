"""msModelSlim (Huawei Ascend), described; it runs in a managed environment of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from quantkit.backends.registry.backend import Backend, Method, Options

if TYPE_CHECKING:
    from quantkit.recipe.model import Recipe


class MsModelSlimOptions(Options):
    """What an msModelSlim recipe may set under `options`."""

    practice: str | None = None
    """A file, or a configuration of msModelSlim's own lab_practice such as
    qwen3/qwen3-32b-dense-w4a4, in place of the recipe's one step."""
    iters: int | None = Field(None, gt=0)
    """Tuning steps a block, for 4-bit activations."""
    model_type: str | None = None
    """The name by which msModelSlim picks its adapter of the model; None is its default one."""

    @field_validator("practice")
    @classmethod
    def _absolute(cls, practice: str | None) -> str | None:
        """The worker runs in another directory."""
        return str(Path(practice).resolve()) if practice and Path(practice).is_file() else practice


def _chosen(recipe: Recipe, method: Method) -> Method:
    if not recipe.options.get("practice"):
        return method
    return replace(method, calibrated=True, folding="norms")


def _unsupported(recipe: Recipe) -> str | None:
    if recipe.on_nan == "keep16":
        return "on_nan=keep16 is not supported by msModelSlim"
    if recipe.on_unseen != "error":
        return (
            f"on_unseen={recipe.on_unseen} is not supported by msModelSlim, which has no scale for "
            "an expert without data"
        )
    return None


def _ascend(algorithm: str, *, calibrated: bool) -> Method:
    return Method(algorithm, "ascend", calibrated=calibrated)


MSMODELSLIM = Backend(
    name="msmodelslim",
    adapter="quantkit.backends.adapters.msmodelslim:run",
    library="msmodelslim",
    distribution="msmodelslim",
    extra="",
    environment="msmodelslim",
    methods={
        "w8a16": _ascend("W8A16", calibrated=False),
        "w8a8_asym": _ascend("W8A8", calibrated=True),
        "w8a8_dynamic": _ascend("W8A8_DYNAMIC", calibrated=False),
        "w4a8_dynamic": _ascend("W4A8_DYNAMIC", calibrated=False),
        "w4a4_dynamic": _ascend("W4A4_DYNAMIC", calibrated=True),
    },
    chosen=_chosen,
    options=MsModelSlimOptions,
    dense_only=True,
    unsupported=_unsupported,
)
