"""msModelSlim (Huawei Ascend), described; it runs in a managed environment of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.registry.backend import Backend, Method, Options

if TYPE_CHECKING:
    from quantkit.recipe import Recipe


class MsModelSlimOptions(Options):
    """What an msModelSlim recipe may set under `options`."""

    practice: str | None = None
    """A configuration of msModelSlim's own lab_practice, in place of the recipe's one step."""


def _unsupported(recipe: Recipe) -> str | None:
    if recipe.on_nan == "keep16":
        return "on_nan=keep16 is not supported by msModelSlim"
    return None


def _ascend(algorithm: str, *, calibrated: bool) -> Method:
    return Method(algorithm, "ascend", calibrated=calibrated)


MSMODELSLIM = Backend(
    name="msmodelslim",
    adapter="quantkit.backends.msmodelslim:run",
    library="msmodelslim",
    distribution="msmodelslim",
    extra="",
    environment="msmodelslim",
    methods={
        "w8a16": _ascend("W8A16", calibrated=False),
        "w8a8": _ascend("W8A8", calibrated=True),
        "w8a8_dynamic": _ascend("W8A8_DYNAMIC", calibrated=False),
        "w4a8_dynamic": _ascend("W4A8_DYNAMIC", calibrated=False),
        "w4a4_dynamic": _ascend("W4A4_DYNAMIC", calibrated=False),
    },
    options=MsModelSlimOptions,
    dense_only=True,
    unsupported=_unsupported,
)
