"""Packing against bit strings written out by hand, ragged widths on purpose."""

from __future__ import annotations

import pytest
import torch

from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import (
    E2M1_VALUES,
    decode_e8m0,
    dequantize,
    effective_scale,
)
from quantkit.formats.packing import (
    pack_awq,
    pack_nibbles,
    pack_words,
    unpack_awq,
    unpack_nibbles,
    unpack_padded_words,
    unpack_words,
)
from tests.support.written import encode_e8m0


def codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns + bits)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)


def stream(row: list[int], bits: int) -> list[int]:
    """A row as one little-endian integer, cut into signed 32-bit words."""
    whole = sum(code << (bits * i) for i, code in enumerate(row))
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100, 576])
def test_words_are_a_bit_stream(bits: int, columns: int) -> None:
    plain = codes(3, columns, bits)
    words = pack_words(plain, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [stream(row, bits) for row in plain.tolist()]
    assert torch.equal(unpack_words(words, bits, columns), plain)


def test_nibbles_put_the_even_column_low() -> None:
    plain = codes(4, 10, 4)
    packed = pack_nibbles(plain)
    assert packed[1, 2] == plain[1, 4] + 16 * plain[1, 5]
    assert torch.equal(unpack_nibbles(packed), plain)


def test_awq_interleaves_eight_outputs() -> None:
    plain = torch.arange(8, dtype=torch.uint8)[None]
    word = int(pack_awq(plain)) & 0xFFFFFFFF
    assert f"{word:08x}" == "75316420"
    many = codes(5, 64, 4)
    assert torch.equal(unpack_awq(pack_awq(many)), many)


def test_padded_three_bit_words_hold_ten_codes() -> None:
    plain = codes(2, 25, 3)
    padded = torch.nn.functional.pad(plain, (0, 5)).reshape(2, 3, 10).long()
    words = (padded << torch.arange(0, 30, 3)).sum(-1).to(torch.int32)
    assert torch.equal(unpack_padded_words(words, 3, 25), plain)


def test_e8m0_round_trip_and_its_ends() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    scales = decode_e8m0(every)
    assert scales[127] == 1
    assert scales[0] == 2.0**-127
    assert scales.isfinite().all()
    assert torch.equal(encode_e8m0(scales), every)
    assert decode_e8m0(torch.tensor([255], dtype=torch.uint8)).isnan().all()
    assert torch.equal(decode_e8m0(every.view(torch.float8_e8m0fnu)), scales)


def test_fp4_table_is_e2m1() -> None:
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert [abs(value) for value in E2M1_VALUES] == magnitudes * 2
    assert all(str(value).startswith("-") for value in E2M1_VALUES[8:])


@pytest.mark.parametrize(
    ("number", "shape"),
    [
        (NumberFormat("int8", "tensor"), (5, 7)),
        (NumberFormat("int8", "channel", symmetric=False), (700, 511)),
        (NumberFormat("int4", "group", group_size=32, symmetric=False), (300, 2048)),
        (NumberFormat("int4", "group", group_size=32), (9, 100)),
        (NumberFormat("fp8_e4m3", "block", block=(128, 128)), (300, 1000)),
        (NumberFormat("fp4_e2m1", "group", group_size=16, scale="e4m3"), (130, 2048)),
    ],
)
def test_dequantize_is_the_formula(number: NumberFormat, shape: tuple[int, int]) -> None:
    """Against a loop over columns, on shapes that end inside a group, a block and a row block."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = shape
    grid = number.scale_shape(shape)
    scale = torch.rand(grid, generator=generator) + 0.5
    if number.element == "fp8_e4m3":
        q = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        values = q.float()
    elif number.element == "fp4_e2m1":
        q = codes(rows, columns, 4)
        values = torch.tensor(E2M1_VALUES)[q.long()]
    else:
        q = (codes(rows, columns, number.bits).short() - (1 << number.bits - 1)).to(torch.int8)
        values = q.float()
    zero_point = None
    if not number.symmetric:
        zero_point = torch.randint(-8, 8, grid, generator=generator).float()
    global_scale = torch.tensor(0.125) if number.scale == "e4m3" else None
    multiplier = torch.rand(columns, generator=generator) + 0.5
    weight = QuantWeight(
        number, q, scale, zero_point, global_scale, input_multiplier=multiplier
    )  # fmt: skip
    height = {"tensor": rows, "block": 128}.get(number.granularity, 1)
    width = {"group": number.group_size, "block": 128}.get(number.granularity) or columns
    wanted = torch.empty(shape)
    row_cells = torch.arange(rows) // height
    for column in range(columns):
        cell = (row_cells, torch.full((rows,), column // width))
        zeros = 0 if zero_point is None else zero_point[cell]
        wanted[:, column] = (
            (values[:, column] - zeros) * effective_scale(weight)[cell] * multiplier[column]
        )
    assert torch.equal(dequantize(weight), wanted)


def test_activation_order_picks_the_group_of_each_column() -> None:
    number = NumberFormat("int4", "group", group_size=2)
    weight = QuantWeight(
        number,
        torch.ones(1, 4, dtype=torch.int8),
        torch.tensor([[10.0, 20.0]]),
        g_idx=torch.tensor([1, 0, 1, 0], dtype=torch.int32),
    )
    assert dequantize(weight).tolist() == [[20.0, 10.0, 20.0, 10.0]]
