"""Which kernel a layer gets, and why none before it."""

from __future__ import annotations

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.runtime.linear.description import (
    describe,
)
from quantkit.runtime.linear.kernels import int8_cpu
from quantkit.runtime.linear.kernels.select import choose, names
from tests.support.kernels import CPU, SHAPES, layer_of, random_weight


def test_a_choice_names_every_reason() -> None:
    layer = describe("l", SCHEMES["fp8"], random_weight(SCHEMES["fp8"], (8, 8)), torch.bfloat16)
    choice = choose(layer, CPU)
    assert choice.kernel.NAME == "reference"
    assert list(choice.refused) == names()[: names().index("reference")]
    with pytest.raises(InputError) as caught:
        choose(layer, CPU, ["int4_cpu", "int8_float_cpu"])
    assert caught.value.code == "kernel.refused"
    assert "int4_cpu: computes INT4" in caught.value.message
    assert "int8_float_cpu: computes INT8" in caught.value.message
    with pytest.raises(InputError) as caught:
        choose(layer, CPU, ["cutlas"])
    assert caught.value.code == "kernel.unknown"


def test_the_dequantized_kernel_is_taken_only_when_asked_for() -> None:
    for name in SHAPES:
        layer, _ = layer_of(name)
        assert choose(layer, CPU).kernel.NAME != "dequantized"
        forced = choose(layer, CPU, ["dequantized"])
        assert forced.weights_only == (layer.scheme.input is not None)


@pytest.mark.parametrize("reason", [None, "this CPU's int8 sums saturate"])
def test_cpu_kernels_are_the_first_choice_where_they_fit(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two kinds of CPU: with VNNI or AMX, and those before, whatever this one is."""
    monkeypatch.setattr(int8_cpu, "inexact", lambda: reason)
    wanted = {"w8a8": "int8_cpu", "w8a16": "int8_weight_cpu", "w4a16": "int4_cpu"}
    for name, kernel in wanted.items():
        choice = choose(layer_of(name)[0], CPU)
        if reason is None or kernel == "int4_cpu":
            assert kernel == choice.kernel.NAME
        else:
            assert choice.kernel.NAME == "int8_float_cpu"
            assert choice.refused[kernel] == reason
