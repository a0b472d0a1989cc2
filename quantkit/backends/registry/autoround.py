"""AutoRound, described."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from quantkit.backends.registry.backend import Backend, Footprint, Method, Options

if TYPE_CHECKING:
    from quantkit.recipe.model import Recipe

LAYOUTS = {
    "auto_round": "auto-round",
    "auto_gptq": "gptq",
    "auto_awq": "awq",
    "llm_compressor": "compressed-tensors",
    "gguf": "gguf",
}
"""AutoRound's name of an export format → the layout that it is."""

_FORMATS = {
    "nvfp4": ("llm_compressor",),
    "mxfp4": ("llm_compressor",),
    "gguf_q4_k_m": ("gguf",),
    "w4a16": ("auto_round", "auto_gptq", "auto_awq", "llm_compressor"),
    "w8a16": ("auto_round", "auto_gptq", "llm_compressor"),
    "w3a16": ("auto_round", "auto_gptq"),
    "w2a16": ("auto_round", "auto_gptq"),
}
"""Scheme → the export formats that hold it, the default first."""


class AutoRoundOptions(Options):
    """What an AutoRound recipe may set under `options`; None is the library's default."""

    format: Literal["auto_round", "auto_gptq", "auto_awq", "llm_compressor", "gguf"] | None = None
    """The export format; None is the first that holds the scheme."""
    iters: Annotated[int, Field(ge=0)] | Literal["best"] = 200
    """Tuning steps a block; 0 rounds to nearest, best is AutoRound's own recipe for accuracy."""
    disable_opt_rtn: bool | None = None
    """With iters 0: take the largest weight's scale instead of searching for a better one."""
    lr: float | None = Field(None, gt=0)
    minmax_lr: float | None = Field(None, gt=0)


def export_format(recipe: Recipe) -> str:
    """AutoRound's name of the format that a recipe is exported to."""
    return str(recipe.options.get("format") or _FORMATS[recipe.scheme][0])


def _chosen(recipe: Recipe, method: Method) -> Method:
    return replace(method, layout=LAYOUTS[export_format(recipe)], calibrated=_calibrated(recipe))


def _calibrated(recipe: Recipe) -> bool:
    """Whether data reach the model: without tuning, only a search or static inputs ask for them.

    8-bit integers are not searched for unless asked; the search for MXFP4 needs weights alone
    (auto_round's `quantization/rtn/config.py` and `autoround.py`).
    """
    plain = recipe.options.get("disable_opt_rtn")
    if plain is None:
        plain = recipe.scheme == "w8a16"
    plain = plain or recipe.scheme == "mxfp4"
    return recipe.scheme == "nvfp4" or recipe.options.get("iters") != 0 or not plain


def _unsupported(recipe: Recipe) -> str | None:
    if recipe.on_nan == "keep16":
        return "on_nan=keep16 is not supported by AutoRound"
    if recipe.on_unseen == "keep16":
        return "on_unseen=keep16 is not supported by AutoRound, which rounds such experts: rtn"
    fitting = _FORMATS.get(recipe.scheme, ())
    chosen = recipe.options.get("format")
    if chosen is not None and fitting and chosen not in fitting:
        return (
            f"AutoRound's format {chosen} does not hold {recipe.scheme} ({', '.join(fitting)} do)"
        )
    if recipe.scheme == "gguf_q4_k_m" and (recipe.overrides or recipe.group_size):
        return "a GGUF type assigns groups and layers itself; remove overrides and group_size"
    return None


AUTOROUND = Backend(
    name="autoround",
    adapter="quantkit.backends.adapters.autoround:run",
    library="auto_round",
    distribution="auto-round",
    extra="autoround",
    resumes="layer",
    methods={
        scheme: Method(name, LAYOUTS[_FORMATS[scheme][0]])
        for scheme, name in (
            ("w2a16", "W2A16"),
            ("w3a16", "W3A16"),
            ("w4a16", "W4A16"),
            ("w8a16", "W8A16"),
            ("nvfp4", "NVFP4"),
            ("mxfp4", "MXFP4"),
            ("gguf_q4_k_m", "GGUF:Q4_K_M"),
        )
    },
    chosen=_chosen,
    options=AutoRoundOptions,
    dense_only=True,
    placements={
        "resident": Footprint(1_100_000_000, 1.0, 6, 2, 0, 4, accelerator_block=0),
        "layerwise": Footprint(1_000_000_000, 1.0, 4.5, 2, 0, 4, accelerator_block=6.7),
        "spread": Footprint(1_100_000_000, 1.0, 6, 2, 0, 4),
    },
    unsupported=_unsupported,
)
