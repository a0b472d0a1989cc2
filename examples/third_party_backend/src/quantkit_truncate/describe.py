"""What quantkit knows of the backend before it starts it. This file must stay quick to import."""

from __future__ import annotations

from pydantic import Field

from quantkit.backends import Backend, Method, Options
from quantkit.recipe.model import Recipe


class TruncateOptions(Options):
    """What a recipe may set under `options`."""

    clip: float = Field(1.0, gt=0, le=1)
    """The largest weight that is kept, as a fraction of the largest of its row."""


def _unsupported(recipe: Recipe) -> str | None:
    if not recipe.symmetric:
        return "truncate writes symmetric weights only"
    return None


TRUNCATE = Backend(
    name="truncate",
    adapter="quantkit_truncate.adapter:run",
    library="quantkit_truncate",
    distribution="quantkit-truncate",
    extra="",
    methods={"w8a16": Method("INT8_ROWS", "compressed-tensors", calibrated=False)},
    options=TruncateOptions,
    overrides=False,
    unsupported=_unsupported,
)
