"""LLM Compressor, described."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from quantkit.backends.registry.backend import Backend, Footprint, Method, Options

if TYPE_CHECKING:
    from quantkit.recipe.model import Recipe

LAYOUT = "compressed-tensors"


class LLMCompressorOptions(Options):
    """What an LLM Compressor recipe may set under `options`; None is the library's default."""

    algorithm: Literal["rtn", "gptq", "awq", "autoround"] | None = None
    """How the weights are rounded; None is gptq for integers and rtn for floats."""
    smoothing_strength: float | None = Field(None, ge=0, le=1)
    """SmoothQuant's alpha; None leaves SmoothQuant out."""
    dampening_frac: float | None = Field(None, gt=0)
    """GPTQ: added to the Hessian's diagonal, as a fraction of its mean."""
    actorder: Literal["static", "weight", "group", "none"] | None = None
    """GPTQ: the order of the columns; group writes g_idx."""
    iters: int | None = Field(None, ge=0)
    """AutoRound: tuning steps a block."""


def _chosen(recipe: Recipe, method: Method) -> Method:
    algorithm = recipe.options.get("algorithm")
    smooth = recipe.options.get("smoothing_strength") is not None
    integers = recipe.scheme.startswith("w")
    rounding = algorithm or ("gptq" if integers else "rtn")
    named = {"rtn": "", "gptq": "GPTQ", "awq": "AWQ", "autoround": "AutoRound"}[rounding]
    steps = " + ".join(part for part in ("SmoothQuant" if smooth else "", named) if part)
    return replace(
        method,
        algorithm=f"{method.algorithm} ({steps})" if steps else method.algorithm,
        calibrated=method.calibrated or rounding != "rtn" or smooth or recipe.kv_cache != "none",
        folding="norms" if smooth or rounding == "awq" else "none",
        accelerator=rounding == "awq",
    )


def _unsupported(recipe: Recipe) -> str | None:
    algorithm = recipe.options.get("algorithm")
    if recipe.on_nan == "keep16":
        return "on_nan=keep16 is not supported by LLM Compressor"
    if recipe.on_unseen != "error":
        return (
            f"on_unseen={recipe.on_unseen} is not supported by LLM Compressor, which has no scale "
            "for an expert without data; experts=all brings some to each"
        )
    if algorithm == "autoround" and recipe.overrides:
        return "LLM Compressor's AutoRound gives every layer the same scheme; remove overrides"
    return None


def _mixed_pictures(recipe: Recipe) -> str | None:
    """Its pipeline for such samples takes one modifier (`_for_mixed_samples` in the adapter)."""
    smooth = recipe.options.get("smoothing_strength") is not None
    if not smooth and recipe.options.get("algorithm") != "awq":
        return None
    return "LLM Compressor cannot smooth and round with samples of which only some have pictures."


def _data_free(algorithm: str) -> Method:
    return Method(algorithm, LAYOUT, calibrated=False)


LLMCOMPRESSOR = Backend(
    name="llmcompressor",
    adapter="quantkit.backends.adapters.llmcompressor:run",
    library="llmcompressor",
    distribution="llmcompressor",
    extra="llmcompressor",
    methods={
        "fp8": Method("FP8", LAYOUT),
        "fp8_dynamic": _data_free("FP8_DYNAMIC"),
        "fp8_block": _data_free("FP8_BLOCK"),
        "w8a8_dynamic": _data_free("W8A8"),
        "w8a16": _data_free("W8A16"),
        "w4a16": _data_free("W4A16"),
        "nvfp4": Method("NVFP4", LAYOUT),
        "nvfp4a16": _data_free("NVFP4A16"),
        "mxfp4": _data_free("MXFP4"),
        "mxfp4a16": _data_free("MXFP4A16"),
        "mxfp8": _data_free("MXFP8"),
        "mxfp8a16": _data_free("MXFP8A16"),
    },
    chosen=_chosen,
    options=LLMCompressorOptions,
    kv_caches=("none", "fp8"),
    dense_only=True,
    pictures=True,
    mixed_pictures=_mixed_pictures,
    placements={
        "resident": Footprint(710_000_000, 1.0, 2.7, 2, accelerator_block=12.6),
        "layerwise": Footprint(
            710_000_000, 0.5, 2.7, 2, 0.6, done_blocks=0.27, accelerator_block=12.6
        ),
        "spread": Footprint(
            710_000_000, 0.5, 2.7, 2, 0.6, done_blocks=0.27, accelerator_block=12.6
        ),
    },
    ranks=True,
    unsupported=_unsupported,
)
