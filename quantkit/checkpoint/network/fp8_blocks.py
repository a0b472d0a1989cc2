"""The blocks of an FP8 source: how many weights share one inverse scale (DeepSeek's layout)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import InputError

BLOCK_SIZE = "weight_block_size"
INVERSE_SCALE = "_scale_inv"
"""What the name of a weight's scales has after that of the weight."""


def weight_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """The (rows, columns) of a block, as `quantization_config` of a config.json (or of its
    text_config) states it; (128, 128) where it states none.

    Raises InputError where it states anything but two positive integers.
    """
    stated = _stated(config)
    if stated is None:
        return (128, 128)
    sizes = two_sizes(stated)
    if sizes is None:
        raise InputError(
            f"config.json states quantization_config.{BLOCK_SIZE}={stated!r}, not two sizes such "
            "as [128, 128].",
            hint="take the model's own config.json, as it was published",
            code="plan.bad_config",
        )
    return sizes


def two_sizes(stated: object) -> tuple[int, int] | None:
    """What a config states as the (rows, columns) of a block; None where that is not two positive
    integers."""
    sides = stated if isinstance(stated, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        return None
    return (sides[0], sides[1])


def states_blocks(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its weights are in blocks; raises as `weight_block`."""
    weight_block(config)
    return _stated(config) is not None


def _stated(config: Mapping[str, Any]) -> object:
    nested = config.get("text_config")
    levels = (config, nested) if isinstance(nested, Mapping) else (config,)
    found = (level.get("quantization_config") for level in levels)
    return next(
        (s[BLOCK_SIZE] for s in found if isinstance(s, Mapping) and s.get(BLOCK_SIZE) is not None),
        None,
    )
