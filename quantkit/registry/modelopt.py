"""NVIDIA ModelOpt, described."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from quantkit.registry.backend import Backend, Folding, Method, Options

if TYPE_CHECKING:
    from quantkit.recipe import Recipe


class ModelOptOptions(Options):
    """What a ModelOpt recipe may set under `options`."""

    algorithm: Literal["max", "mse", "smoothquant", "awq_lite", "awq_full", "awq_clip"] | None = (
        None
    )
    """The calibration algorithm; None is the one ModelOpt pairs with the scheme."""


def _method(algorithm: str, *, calibrated: bool = True, folding: Folding = "none") -> Method:
    return Method(algorithm, "modelopt", calibrated=calibrated, folding=folding)


def _unsupported(recipe: Recipe) -> str | None:
    if recipe.on_nan == "keep16":
        return "on_nan=keep16 is not supported by ModelOpt"
    return None


MODELOPT = Backend(
    name="modelopt",
    adapter="quantkit.backends.modelopt:run",
    library="modelopt",
    distribution="nvidia-modelopt",
    extra="modelopt",
    methods={
        "fp8": _method("FP8"),
        "nvfp4": _method("NVFP4"),
        "w8a8": _method("W8A8_SQ_PER_CHANNEL", folding="multiplier"),
        "w4a16": _method("W4A16_AWQ", folding="norms"),
    },
    options=ModelOptOptions,
    kv_caches=("none", "fp8", "nvfp4"),
    overrides=False,
    dense_only=True,
    saves_state=True,
    unsupported=_unsupported,
)
