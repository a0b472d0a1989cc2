"""Single rows and groups: what GPTQ trades away is sound, what is another's or nobody's is not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.formats.base import QuantWeight
from quantkit.verification.weights.compare import compare, nearest_other
from quantkit.verification.weights.judge import garbled
from tests.support.gptq import gptq

ROWS, COLUMNS, GROUP = 64, 256, 64
SCHEME = {
    bits: SCHEMES["w4a16"].with_weight(element=f"int{bits}", group_size=GROUP) for bits in (3, 4)
}


def layer(seed: int) -> torch.Tensor:
    """Gaussian weights with a heavy-tailed row and one huge weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight[5] *= torch.exp(1.2 * torch.randn(COLUMNS, generator=generator))
    weight[7, 17] = 60.0
    return weight


def inputs(seed: int, rank: int, spread: float, samples: int) -> torch.Tensor:
    """Correlated channels (`rank` directions over noise) of uneven energy."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.randn(samples, COLUMNS, generator=generator)
    x += torch.randn(samples, rank, generator=generator) @ torch.randn(
        rank, COLUMNS, generator=generator
    )
    return x * torch.exp(spread * torch.randn(COLUMNS, generator=generator))


def told(weight: QuantWeight, source: torch.Tensor, scheme: Scheme) -> str | None:
    sums = compare(weight, source)
    return garbled(sums, scheme, COLUMNS, partial(nearest_other, weight, source, columns=None))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("samples", [128, 512])
@pytest.mark.parametrize(("rank", "spread"), [(4, 1.0), (4, 2.0), (32, 1.0), (32, 2.0)])
def test_what_gptq_writes_is_sound(bits: int, samples: int, rank: int, spread: float) -> None:
    for seed in range(3):
        source = layer(seed)
        weight = gptq(source, inputs(seed, rank, spread, samples), bits, GROUP)
        assert told(weight, source, SCHEME[bits]) is None


def test_gptq_makes_rows_that_their_distance_alone_would_condemn() -> None:
    """Else the test above shows nothing; layers of the demo model have rows of -7 dB."""
    sums = compare(gptq(layer(3), inputs(3, 32, 2.0, 512), 3, GROUP), layer(3))
    target, cross, actual = (part.sum(1) for part in (sums.target, sums.cross, sums.actual))
    assert float((target / (target - 2 * cross + actual)).log10().min()) * 10 < -3.0


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_rows_in_each_others_place_are_found(bits: int, seed: int) -> None:
    weight, source = sound(seed, bits)
    order = torch.arange(ROWS)
    order[[20, 31]] = order[[31, 20]]
    swapped = replace(weight, q=weight.q[order], scale=weight.scale[order])
    assert "2 of 64 rows are not the source's" in (told(swapped, source, SCHEME[bits]) or "")


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_rows_that_resemble_each_other_are_found_too(bits: int, seed: int) -> None:
    """Rows with a cosine of 0.6: each keeps some likeness to its own source."""
    generator = torch.Generator().manual_seed(seed + 100)
    source = layer(seed)
    source[31] = 0.6 * source[20] + 0.8 * torch.randn(COLUMNS, generator=generator)
    weight = gptq(source, inputs(seed, 4, 1.0, 512), bits, GROUP)
    assert told(weight, source, SCHEME[bits]) is None
    order = torch.arange(ROWS)
    order[[20, 31]] = order[[31, 20]]
    swapped = replace(weight, q=weight.q[order], scale=weight.scale[order])
    assert "rows are not the source's" in (told(swapped, source, SCHEME[bits]) or "")


@pytest.mark.parametrize("bits", [3, 4])
def test_a_row_of_nobody_is_found(bits: int) -> None:
    weight, source = sound(0, bits)
    codes = weight.q.clone()
    codes[40] = codes[40, torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    found = told(replace(weight, q=codes), source, SCHEME[bits])
    assert found is not None
    assert "1 of 64 rows" in found
    assert "(row 40)" in found


def test_a_group_of_nobody_in_a_sound_row_is_found() -> None:
    weight, source = sound(0, 4)
    codes = weight.q.clone()
    codes[40, 64:128] = codes[40, 64:128].flip(0)
    found = told(replace(weight, q=codes), source, SCHEME[4])
    assert found is not None
    assert "1 of 256 groups" in found
    assert "(row 40, group 1)" in found


def sound(seed: int, bits: int) -> tuple[QuantWeight, torch.Tensor]:
    source = layer(seed)
    weight = gptq(source, inputs(seed, 4, 1.0, 512), bits, GROUP)
    assert told(weight, source, SCHEME[bits]) is None
    return weight, source
