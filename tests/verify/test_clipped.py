"""Tuned clipping shrinks whole rows on purpose; a wrong scale is still told from it."""

from __future__ import annotations

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES, NumberFormat
from quantkit.formats.base import QuantWeight
from quantkit.verification.weights.compare import compare
from quantkit.verification.weights.judge import faults

ROWS, COLUMNS = 16, 576


def clipped(threshold: float) -> tuple[QuantWeight, torch.Tensor]:
    """A Gaussian source [16, 576], rounded to int4 a row after clipping row 3 at `threshold`
    standard deviations, as learned clipping does."""
    source = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    limits = source.abs().amax(1, keepdim=True)
    limits[3] = threshold
    scale = limits / 7
    codes = (source / scale).round().clamp(-8, 7).to(torch.int8)
    return QuantWeight(NumberFormat("int4", "channel"), codes, scale), source


def told(weight: QuantWeight, source: torch.Tensor) -> list[str]:
    scheme = SCHEMES["w4a4_dynamic"]
    return faults(
        compare(weight, source), scheme, lambda: compare(weight, source, unclipped=True)
    )  # fmt: skip


def test_a_row_that_was_clipped_hard_is_no_fault() -> None:
    weight, source = clipped(0.8)
    gain = float(compare(weight, source).row_gain()[3])
    assert gain < 0.7
    assert told(weight, source) == []


@pytest.mark.parametrize(("threshold", "factor"), [(0.8, 0.6), (3.0, 0.6), (3.0, 1.5)])
def test_a_wrong_scale_is_a_fault_whether_the_row_was_clipped_or_not(
    threshold: float, factor: float
) -> None:
    weight, source = clipped(threshold)
    weight.scale[3] *= factor
    assert ["row 3" in text for text in told(weight, source)] == [True]


@pytest.mark.parametrize(
    ("element", "codes", "ends"),
    [
        ("fp4_e2m1", torch.tensor([[7, 6, 15, 14, 0]], dtype=torch.uint8), [0, 2]),
        ("fp8_e4m3", torch.tensor([[448.0, 416.0, -448.0]]).to(torch.float8_e4m3fn), [0, 2]),
        ("int4", torch.tensor([[7, 0, -8, 6]], dtype=torch.int8), [0, 2]),
    ],
)
def test_the_ends_of_a_range_are_left_out(
    element: str, codes: torch.Tensor, ends: list[int]
) -> None:
    weight = QuantWeight(NumberFormat(element, "channel"), codes, torch.ones(1, 1))  # type: ignore[arg-type]
    ones = torch.ones(1, codes.shape[1])
    assert float(compare(weight, ones, unclipped=True).target.sum()) == codes.shape[1] - len(ends)
