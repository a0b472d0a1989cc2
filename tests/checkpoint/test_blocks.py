"""`weight_block_size` is read in one place: two sizes, or a refusal that names the value."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.checkpoint.network.fp8_blocks import states_blocks, weight_block
from quantkit.errors import InputError


def stating(block: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}


@pytest.mark.parametrize("config", [stating([64, 128]), {"text_config": stating([64, 128])}])
def test_two_sizes_are_rows_and_columns(config: dict[str, Any]) -> None:
    assert weight_block(config) == (64, 128)
    assert states_blocks(config)


@pytest.mark.parametrize("config", [{}, stating(None), {"quantization_config": "none"}])
def test_silence_is_the_usual_block(config: dict[str, Any]) -> None:
    assert weight_block(config) == (128, 128)
    assert not states_blocks(config)


@pytest.mark.parametrize(
    "block", [128, 0, [], [128], [128] * 3, [0, 128], ["a", 1], "ab", [True, 1]]
)
def test_anything_else_is_refused_with_its_value(block: Any) -> None:
    for read in (weight_block, states_blocks):
        with pytest.raises(InputError, match="weight_block_size") as caught:
            read(stating(block))
        assert repr(block) in str(caught.value)
