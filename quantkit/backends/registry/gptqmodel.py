"""GPTQModel, described."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from quantkit.backends.registry.backend import Backend, Footprint, Method, Options

if TYPE_CHECKING:
    from quantkit.recipe.model import Recipe


class GPTQModelOptions(Options):
    """What a GPTQModel recipe may set under `options`; None is the library's default."""

    method: Literal["gptq", "awq"] = "gptq"
    format: Literal["gptq", "gptq_v2"] = "gptq"
    """GPTQ's on-disk layout: engines load v1; v2 stores the zero points without the offset of 1."""
    desc_act: bool | None = None
    """Quantize columns by falling activation; g_idx is then not sorted."""
    act_group_aware: bool | None = None
    """Order by activation inside groups only, so that g_idx stays sorted."""
    damp_percent: float | None = Field(None, gt=0, lt=1)
    mse: float | None = Field(None, ge=0)
    """The power of the error that clipping minimises; 0 does not clip."""


def _chosen(recipe: Recipe, method: Method) -> Method:
    if recipe.options.get("method") != "awq":
        return method
    return replace(method, algorithm="AWQ", layout="awq", folding="norms", accelerator=True)


def _unsupported(recipe: Recipe) -> str | None:
    options = recipe.options
    if recipe.on_nan == "keep16":
        return "on_nan=keep16 is not supported by GPTQModel"
    if recipe.on_unseen == "keep16":
        return "on_unseen=keep16 is not supported by GPTQModel, which rounds such experts: rtn"
    if options.get("method") == "awq" and recipe.scheme != "w4a16":
        return f"GPTQModel's AWQ writes 4 bits only, not {recipe.scheme}"
    if options.get("desc_act") and options.get("act_group_aware"):
        return "desc_act and act_group_aware exclude each other"
    return None


GPTQMODEL = Backend(
    name="gptqmodel",
    adapter="quantkit.backends.adapters.gptqmodel:run",
    library="gptqmodel",
    distribution="GPTQModel",
    extra="gptqmodel",
    resumes="layer",
    methods={scheme: Method("GPTQ", "gptq") for scheme in ("w8a16", "w4a16", "w3a16", "w2a16")},
    chosen=_chosen,
    options=GPTQModelOptions,
    dense_only=True,
    placements={
        "layerwise": Footprint(1_100_000_000, 1.0, 6, 2, 1.6, 2, accelerator_block=7),
        "resident": Footprint(
            1_100_000_000, 1.0, 6, 2, 0.6, 2, accelerator_block=7, blocks_on_host=True
        ),
    },
    unsupported=_unsupported,
)
