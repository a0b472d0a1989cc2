"""Four-bit weights in the order in which tensor cores take them.

A *tile* is 16 rows by 64 columns, four steps of `mma.m16n8k16` (PTX ISA, matrix fragments for
.bf16), in 128 words of 32 bits: the four words of a lane are its fragments of the four steps. A
fragment has eight codes in four registers; those of register r are nibbles r and r + 4, which one
mask takes out as a pair of 16-bit numbers. Weights thus go from memory to the tensor cores through
a few registers, as in Marlin (https://github.com/IST-DASLab/marlin). `few_rows` has the product.
"""

from __future__ import annotations

import torch

ROWS, COLUMNS = 16, 64


def fragments(codes: torch.Tensor, fine: bool) -> torch.Tensor:
    """uint8 codes 0 … 15 [out, in], in a multiple of 64 → int32 words [tiles, in / 64, 128].

    `fine` lets a step take 16 columns that lie together, else two steps take 32 between them.
    """
    rows, columns = codes.shape
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -rows % ROWS))
    if fine:  # columns are (step, lane's place, register / 2, half)
        cells = codes.view(-1, 2, 8, columns // COLUMNS, 4, 4, 2, 2)
        ordered = cells.permute(0, 3, 2, 5, 4, 7, 6, 1)
    else:  # (pair of steps, lane's place, step, register / 2, half)
        cells = codes.view(-1, 2, 8, columns // COLUMNS, 2, 4, 2, 2, 2)
        ordered = cells.permute(0, 3, 2, 5, 4, 6, 8, 7, 1)
    nibbles = ordered.reshape(-1, columns // COLUMNS, 128, 8)
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32, device=codes.device)
    for nibble in range(8):
        words |= nibbles[..., nibble].int() << (4 * nibble)
    return words


def by_tile(grid: torch.Tensor) -> torch.Tensor:
    """A grid [out, groups] → [tiles, groups, 8, 2]: rows r and r + 8 of a tile side by side."""
    padded = torch.nn.functional.pad(grid, (0, 0, 0, -grid.shape[0] % ROWS))
    return padded.view(-1, 2, 8, grid.shape[1]).permute(0, 3, 2, 1).contiguous()


def packed_zero(zero: torch.Tensor) -> torch.Tensor:
    """int32 that hold -128 - zero twice, in bfloat16; zeros are whole numbers from 0 to 128."""
    half = (-128 - zero).to(torch.bfloat16).view(torch.int16)
    return torch.stack((half, half), -1).view(torch.int32).squeeze(-1)
