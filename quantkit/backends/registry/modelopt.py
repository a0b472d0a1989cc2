"""NVIDIA ModelOpt, described."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from quantkit.backends.registry.backend import Backend, Folding, Footprint, Method, Options

if TYPE_CHECKING:
    from quantkit.recipe.model import Recipe


class ModelOptOptions(Options):
    """What a ModelOpt recipe may set under `options`."""

    algorithm: Literal["max", "mse", "smoothquant", "awq_lite", "awq_full", "awq_clip"] | None = (
        None
    )
    """The calibration algorithm; None is the one ModelOpt pairs with the scheme."""


def _method(algorithm: str, *, calibrated: bool = True, folding: Folding = "none") -> Method:
    return Method(algorithm, "modelopt", calibrated=calibrated, folding=folding)


def _chosen(recipe: Recipe, method: Method) -> Method:
    """NVFP4 with a search for input scales is another format: it stores the input multipliers."""
    if recipe.scheme == "nvfp4" and str(recipe.options.get("algorithm", "")).startswith("awq"):
        return replace(method, algorithm="NVFP4_AWQ", folding="norms", accelerator=True)
    return method


def _unsupported(recipe: Recipe) -> str | None:
    if recipe.on_nan == "keep16":
        return "on_nan=keep16 is not supported by ModelOpt"
    return None


MODELOPT = Backend(
    name="modelopt",
    adapter="quantkit.backends.adapters.modelopt:run",
    library="modelopt",
    distribution="nvidia-modelopt",
    extra="modelopt",
    methods={
        "fp8": _method("FP8"),
        "nvfp4": _method("NVFP4"),
        "w8a8": _method("W8A8_SQ_PER_CHANNEL", folding="multiplier"),
        "w4a16": _method("W4A16_AWQ", folding="norms"),
        "fp8_dynamic": _method("FP8_PER_CHANNEL_PER_TOKEN", calibrated=False),
        "fp8_block_weight_only": _method("FP8_PB_WO", calibrated=False),
        "nvfp4a16": _method("W4A16_NVFP4", calibrated=False),
        "mxfp8": _method("MXFP8", calibrated=False),
        "w4a8_awq": _method("W4A8_AWQ", folding="norms"),
    },
    chosen=_chosen,
    options=ModelOptOptions,
    kv_caches=("none", "fp8", "nvfp4"),
    overrides=False,
    dense_only=True,
    pictures=True,
    saves_state=True,
    resumes="layer",
    placements={
        "resident": Footprint(1_400_000_000, 1.0, 6, 2, measured=("fp8",), accelerator_block=2),
        "layerwise": Footprint(
            1_400_000_000, 1.0, 6, 2, 1, 4, measured=("fp8",), accelerator_block=2
        ),
        "spread": Footprint(1_400_000_000, 1.0, 6, 2, accelerator_block=2),
    },
    unsupported=_unsupported,
)
