"""INT8 products on CPUs whose sums are exact, and on those whose sums saturate."""

from __future__ import annotations

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import (
    describe,
)
from quantkit.runtime.linear.kernels import int8_cpu, int8_float_cpu


@pytest.mark.parametrize("zero", [None, -128.0], ids=["symmetric", "zero point"])
def test_float32_products_of_int8_codes_are_exact_where_sums_are_largest(
    zero: float | None,
) -> None:
    """Sums over 2^24, odd on purpose, against int64: float32 alone cannot hold them."""
    columns = 4099
    generator = torch.Generator().manual_seed(7)
    q = torch.randint(100, 128, (3, columns), generator=generator).to(torch.int8)
    codes = torch.randint(100, 128, (5, columns), generator=generator)
    weight = QuantWeight(
        SCHEMES["w8a8"].weight, q, torch.ones(3, 1), input_scale=torch.ones(1),
        input_zero_point=None if zero is None else torch.tensor([zero]),
    )  # fmt: skip
    layer = describe("x", SCHEMES["w8a8"], weight, torch.float32)
    x = codes.float() - (zero or 0.0)
    found = int8_float_cpu.apply(x, int8_float_cpu.prepare(weight, layer))
    exact = (codes - int(zero or 0)) @ q.long().T
    assert int(exact.min()) > 2**24
    assert torch.equal(found, exact.float())


def test_sums_that_saturate_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `vpmaddubsw` has it: pairs of products in 16 bit."""

    def saturating(x: torch.Tensor, _: object, scale: torch.Tensor) -> torch.Tensor:
        pairs = (x.int() + 128).view(x.shape[0], -1, 2) * 127
        sums = pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1, keepdim=True)
        return (sums - 128 * 127 * x.shape[1]) * scale

    int8_cpu.inexact.cache_clear()
    monkeypatch.setattr(int8_cpu, "multiply", saturating)
    assert int8_cpu.inexact() == "this CPU's int8 sums saturate"
    int8_cpu.inexact.cache_clear()
    monkeypatch.setattr(int8_cpu, "multiply", lambda *_: torch.full((16, 16), 127.0 * 127 * 64))
    assert int8_cpu.inexact() is None
    int8_cpu.inexact.cache_clear()
