"""Four-bit codes in 32-bit words, arranged for the kernels that read them, and their decoding.

A *cell* is 32 columns of one row in four words. Nibble j of word c of a cell is its column 4 j + c:
a thread that loads the 16 bytes of a cell meets its columns in four consecutive ones at a time, as
it meets the activations. Unsigned codes are kept (q + 8 for integers, E2M1 codes for FP4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CELL = 32


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0 … 15 [out, in], in a multiple of 32 → int32 words [out, in / 8]."""
    rows, columns = codes.shape
    cells = codes.view(rows, columns // CELL, 8, 4)
    words = torch.zeros(rows, columns // CELL, 4, dtype=torch.int32, device=codes.device)
    for nibble in range(8):
        words |= cells[:, :, nibble].int() << (4 * nibble)
    return words.view(rows, columns // 8)


@triton.jit
def integer(words, NIBBLE: tl.constexpr):
    """The code at a nibble as a float32, plus `offset(NIBBLE)`.

    The nibble becomes mantissa bits under a fixed exponent: two instructions, none a conversion.
    """
    LEFT: tl.constexpr = NIBBLE < 2
    if LEFT:
        moved = words << 12
    elif NIBBLE == 2:
        moved = words << 4
    elif NIBBLE < 5:
        moved = words
    elif NIBBLE < 7:
        moved = words >> 8
    else:
        moved = words >> 16
    if NIBBLE == 1 or NIBBLE == 4 or NIBBLE == 6:
        bits = (moved & 0xF0000) | 0x43000000
    else:
        bits = (moved & 0xF000) | 0x45000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def offset(NIBBLE: tl.constexpr):
    """What `integer` adds: 2^7 to codes at bit 16, 2^11 to codes at bit 12."""
    return 128.0 if NIBBLE == 1 or NIBBLE == 4 or NIBBLE == 6 else 2048.0


@triton.jit
def e2m1(words, NIBBLE: tl.constexpr):
    """The E2M1 number at a nibble as a float32, times 2^-126.

    Its exponent and mantissa are put in place of a float32's; the bias is the caller's to undo.
    """
    if NIBBLE < 6:
        low = words << (22 - 4 * NIBBLE)
    else:
        low = words >> (4 * NIBBLE - 22)
    bits = (low & 0x01C00000) | ((words << (28 - 4 * NIBBLE)) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def value(words, NIBBLE: tl.constexpr, FLOATING: tl.constexpr):
    """The code at a nibble as the number that it stands for, float32."""
    if FLOATING:
        return e2m1(words, NIBBLE) * 8.507059173023462e37
    return integer(words, NIBBLE) - offset(NIBBLE)


@triton.jit
def tile(
    words, scale, zero, row, cell, rows, cells, groups,
    GROUP: tl.constexpr, FLOATING: tl.constexpr, ZERO: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Weights [BN, 32 × BC] in bfloat16, of the rows and cells given; zeros outside.

    ZERO is what integer codes are relative to where `zero` is None.
    """
    word = tl.arange(0, BC * 4)
    first = tl.min(cell, 0) * 4
    inside = (row < rows)[:, None] & (first + word < cells * 4)[None, :]
    w = tl.load(
        words + row.to(tl.int64)[:, None] * (cells * 4) + (first + word)[None, :], inside, other=0
    )
    v04 = tl.join(value(w, 0, FLOATING), value(w, 4, FLOATING))
    v26 = tl.join(value(w, 2, FLOATING), value(w, 6, FLOATING))
    v15 = tl.join(value(w, 1, FLOATING), value(w, 5, FLOATING))
    v37 = tl.join(value(w, 3, FLOATING), value(w, 7, FLOATING))
    joined = tl.join(tl.join(v04, v26), tl.join(v15, v37))
    ordered = tl.permute(tl.reshape(joined, (BN, BC, 4, 8)), (0, 1, 3, 2))
    HALVES: tl.constexpr = 2 if GROUP == 16 else 1
    values = tl.reshape(ordered, (BN, BC * HALVES, 32 // HALVES))
    part = tl.min(cell, 0) * HALVES + tl.arange(0, BC * HALVES)
    at = row.to(tl.int64)[:, None] * groups + (part * (32 // HALVES) // GROUP)[None, :]
    there = (row < rows)[:, None] & (part < cells * HALVES)[None, :]
    s = tl.load(scale + at, there, other=0.0).to(tl.float32)
    if not FLOATING:
        if zero is None:
            values -= ZERO
        else:
            values -= tl.load(zero + at, there, other=0.0).to(tl.float32)[:, :, None]
    return tl.reshape((values * s[:, :, None]).to(tl.bfloat16), (BN, BC * 32))
