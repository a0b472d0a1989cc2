"""Four-bit weights of `fragments` back in rows and columns, in bfloat16."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _value(words, NIBBLE: tl.constexpr, FLOATING: tl.constexpr):
    """The number at a nibble, exact in bfloat16: an unsigned integer or E2M1.

    The exponent and mantissa of E2M1 are put in place of a float32's, which makes it 2^-126 times
    what it is.
    """
    if FLOATING:
        if NIBBLE < 6:
            low = words << (22 - 4 * NIBBLE)
        else:
            low = words >> (4 * NIBBLE - 22)
        bits = (low & 0x01C00000) | ((words << (28 - 4 * NIBBLE)) & -2147483648)
        return (bits.to(tl.float32, bitcast=True) * 8.507059173023462e37).to(tl.bfloat16)
    return ((words >> (4 * NIBBLE)) & 15).to(tl.float32).to(tl.bfloat16)


@triton.jit
def tile(
    words, scale, zero, start_row, start, rows, blocks, groups,
    GROUP: tl.constexpr, FLOATING: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Weights [BN, BK] from a row that is a multiple of 16 and a column that is one of 64."""
    TILES: tl.constexpr = BN // 16
    BLOCKS: tl.constexpr = BK // 64
    t = start_row // 16 + tl.arange(0, TILES)
    block = start // 64 + tl.arange(0, BLOCKS)
    inside = (t * 16 < rows)[:, None, None] & (block < blocks)[None, :, None]
    at = (t.to(tl.int64)[:, None, None] * blocks + block[None, :, None]) * 128
    w = tl.load(words + at + tl.arange(0, 128)[None, None, :], inside, other=0)
    first = tl.join(
        tl.join(_value(w, 0, FLOATING), _value(w, 4, FLOATING)),
        tl.join(_value(w, 2, FLOATING), _value(w, 6, FLOATING)),
    )
    second = tl.join(
        tl.join(_value(w, 1, FLOATING), _value(w, 5, FLOATING)),
        tl.join(_value(w, 3, FLOATING), _value(w, 7, FLOATING)),
    )
    joined = tl.reshape(tl.join(first, second), (TILES, BLOCKS, 8, 4, 2, 2, 2, 2, 2))
    if GROUP == 16:
        ordered = tl.permute(joined, (0, 8, 2, 1, 4, 5, 3, 7, 6))
    else:
        ordered = tl.permute(joined, (0, 8, 2, 1, 4, 3, 5, 7, 6))
    WIDE: tl.constexpr = 16 if GROUP == 16 else 32
    values = tl.reshape(ordered, (BN, BK // WIDE, WIDE)).to(tl.float32)
    row = start_row + tl.arange(0, BN)
    part = start // WIDE + tl.arange(0, BK // WIDE)
    place = (row // 16 * groups)[:, None] + (part * WIDE // GROUP)[None, :]
    place = place * 16 + (row % 8 * 2 + row % 16 // 8)[:, None]
    there = (row < rows)[:, None] & (part * WIDE < blocks * 64)[None, :]
    if zero is not None:
        bits = tl.load(zero + place, there, other=0) & -65536
        values += (bits.to(tl.float32, bitcast=True) + 128.0)[:, :, None]
    elif not FLOATING:
        values -= 8.0
    s = tl.load(scale + place, there, other=0.0).to(tl.float32)
    return tl.reshape((values * s[:, :, None]).to(tl.bfloat16), (BN, BK))
