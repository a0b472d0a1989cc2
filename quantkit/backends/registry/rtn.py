"""The built-in streaming backend, described: round to nearest, shard by shard, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from quantkit.backends.registry.backend import Backend, Footprint, Method, Options

if TYPE_CHECKING:
    from quantkit.recipe.model import Recipe


class StreamingOptions(Options):
    """What an `rtn_*` recipe may set under `options`."""

    layout: Literal["compressed-tensors", "gptq", "awq"] = "compressed-tensors"
    """GPTQ and AWQ hold 4-bit weights only."""

    clip: Literal["none", "mse"] = "none"
    """`mse` searches each integer scale for the least squared error."""


def _chosen(recipe: Recipe, method: Method) -> Method:
    layout = str(recipe.options.get("layout", "compressed-tensors"))
    return Method(method.algorithm, layout, calibrated=False)


def _unsupported(recipe: Recipe) -> str | None:
    layout = recipe.options.get("layout", "compressed-tensors")
    if layout != "compressed-tensors" and recipe.scheme != "w4a16":
        return f"the {layout} layout holds w4a16 only, not {recipe.scheme}"
    if layout == "awq" and recipe.symmetric:
        return "the awq layout has zero points: --set symmetric=false"
    return None


_ALGORITHMS = {
    "fp8_dynamic": "FP8_DYNAMIC",
    "fp8_block": "FP8_BLOCK",
    "w8a8_dynamic": "INT8",
    "w8a16": "W8A16",
    "w4a16": "W4A16",
    "nvfp4a16": "NVFP4A16",
    "mxfp4a16": "MXFP4A16",
    "mxfp8": "MXFP8",
}

RTN = Backend(
    name="rtn",
    adapter="",
    way="streaming",
    library="torch",
    distribution="quantkit",
    extra="",
    resumes="shard",
    methods={
        scheme: Method(name, "compressed-tensors", calibrated=False)
        for scheme, name in _ALGORITHMS.items()
    },
    chosen=_chosen,
    options=StreamingOptions,
    reads_fp8_blocks=True,
    placements={
        "layerwise": Footprint(400_000_000, 0, 0, 0),
    },
    unsupported=_unsupported,
)
