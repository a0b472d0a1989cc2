"""Four-bit weights in the order in which tensor cores take them, and their product with few rows.

A *tile* is 16 rows by 64 columns, four steps of `mma.m16n8k16` (PTX ISA, matrix fragments for
.bf16), in 128 words of 32 bits: the four words of a lane are its fragments of the four steps. A
fragment has eight codes in four registers; those of register r are nibbles r and r + 4, which one
mask takes out as a pair of 16-bit numbers. Weights thus go from memory to the tensor cores through
a few registers, as in Marlin (https://github.com/IST-DASLab/marlin).

Gluon is Triton's language with the lanes' places spelled out, which the instruction depends on.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.runtime.gpu.early import early

ROWS, COLUMNS = 16, 64
ROWS_AT_ONCE = 8
"""Rows of the activations that one instruction takes."""


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


def _integer_assembly() -> str:
    """Word, and `packed_zero` of rows r and r + 8 → four registers of pairs code - zero."""
    lines = ["{ .reg .b32 t, o;", "mov.b32 t, $4;", "mov.b32 o, 0x3F803F80;"]
    for register in range(4):
        if register:
            lines.append(f"shr.u32 t, $4, {4 * register};")
        lines.append(f"lop3.b32 ${register}, t, 0x000F000F, 0x43004300, 0xEA;")
        lines.append(f"fma.rn.bf16x2 ${register}, ${register}, o, ${5 + register % 2};")
    return " ".join([*lines, "}"])


def _floating_assembly() -> str:
    """Word → four registers of pairs of E2M1 numbers, times 2^-126."""
    lines = ["{ .reg .b32 t, s;"]
    for register, move in enumerate(("shl.b32 t, $4, 6", "shl.b32 t, $4, 2", "shr.u32 t, $4, 2",
                                     "shr.u32 t, $4, 6")):  # fmt: skip
        lines.append(f"{move};")
        lines.append(f"shl.b32 s, $4, {12 - 4 * register};")
        lines.append("and.b32 s, s, 0x80008000;")
        lines.append(f"lop3.b32 ${register}, t, 0x01C001C0, s, 0xEA;")
    return " ".join([*lines, "}"])


def _product_assembly(sums: int) -> str:
    """Four steps added up into `sums` results of four float32 each."""
    start = 4 * sums
    weights = [[start + 4 * register + step for register in range(4)] for step in range(4)]
    inputs = start + 16
    lines = ["{ .reg .f32 z;", "mov.f32 z, 0f00000000;"]
    for step in range(4):
        first = 4 * (step * sums // 4)
        out = ", ".join(f"${first + at}" for at in range(4))
        fresh = step % (4 // sums) == 0
        a = ", ".join(f"${at}" for at in weights[step])
        b = f"${inputs + 2 * step}, ${inputs + 2 * step + 1}"
        c = "z, z, z, z" if fresh else out
        lines.append(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            f"{{{out}}}, {{{a}}}, {{{b}}}, {{{c}}};"
        )
    return " ".join([*lines, "}"])


_INTEGER = gl.constexpr(_integer_assembly())
_FLOATING = gl.constexpr(_floating_assembly())
_SUMS_1 = gl.constexpr(_product_assembly(1))
_SUMS_2 = gl.constexpr(_product_assembly(2))
_SUMS_4 = gl.constexpr(_product_assembly(4))
_TIMES_2_64 = gl.constexpr(
    "{ .reg .b32 t, n; mov.b32 t, 0x5F805F80; mov.b32 n, 0x80008000; fma.rn.bf16x2 $0, $1, t, n; }"
)
_CONSTRAINTS_1 = gl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24))
_CONSTRAINTS_2 = gl.constexpr(",".join(["=&f"] * 8 + ["r"] * 24))
_CONSTRAINTS_4 = gl.constexpr(",".join(["=&f"] * 16 + ["r"] * 24))


@gluon.jit
def _scales(scale, tile, block, blocks, groups, PART: gl.constexpr, GROUP: gl.constexpr,
            KB: gl.constexpr, EVEN: gl.constexpr, L4: gl.constexpr):  # fmt: skip
    """Scales [KB, 32, 2] of a lane's two rows for columns 64 block + PART …"""
    L3: gl.constexpr = gl.SliceLayout(3, L4)
    k = gl.arange(0, KB, gl.SliceLayout(1, gl.SliceLayout(2, L3)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, L3)))
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    group = ((block + k) * 64 + PART) // GROUP
    at = group.to(gl.int64)[:, None, None] * 16 + (lane // 4 * 2)[None, :, None]
    at = scale + tile.to(gl.int64) * groups * 16 + (at + half[None, None, :])
    there = ((k * 0 if EVEN else k) + block < blocks)[:, None, None]  # EVEN: one for all
    there = there & (lane >= 0)[None, :, None]
    return gl.load(at, there, other=0.0)


@gluon.jit
def _read(
    words, scale, zero, tile, block, blocks, groups,
    GROUP: gl.constexpr, KB: gl.constexpr, EVEN: gl.constexpr, L2: gl.constexpr,
    L4: gl.constexpr,
):  # fmt: skip
    """What a program needs of the weight for KB blocks: words, zeros, scales of up to four parts.

    Past the last block all are zeros; EVEN says that KB divides their number.
    """
    k = gl.arange(0, KB, gl.SliceLayout(1, L2))
    word = gl.arange(0, 128, gl.SliceLayout(0, L2))
    at = words + (tile.to(gl.int64) * blocks + block) * 128
    at = at + (k.to(gl.int64)[:, None] * 128 + word[None, :])
    there = ((k * 0 if EVEN else k) + block < blocks)[:, None]
    k += block
    w = gl.load(at, there, other=0)
    if zero is None:
        z = gl.full([KB, 128], -1022835960, gl.int32, L2)  # -136 twice: codes less 8
        z8 = z
    else:
        group = (k[:, None] * 64 + (word % 4 // 2 * 32)[None, :]) // GROUP
        place = zero + (tile * groups + group) * 16 + (word // 16 * 2)[None, :]
        z = gl.load(place, there, other=0)
        z8 = gl.load(place + 1, there, other=0)
    s0 = _scales(scale, tile, block, blocks, groups, 0, GROUP, KB, EVEN, L4)
    s1, s2, s3 = s0, s0, s0
    if GROUP == 16:
        s1 = _scales(scale, tile, block, blocks, groups, 16, GROUP, KB, EVEN, L4)
        s2 = _scales(scale, tile, block, blocks, groups, 32, GROUP, KB, EVEN, L4)
        s3 = _scales(scale, tile, block, blocks, groups, 48, GROUP, KB, EVEN, L4)
    elif GROUP % 64 != 0:
        s1 = _scales(scale, tile, block, blocks, groups, 32, GROUP, KB, EVEN, L4)
    return w, z, z8, s0, s1, s2, s3


@gluon.jit
def _scaled(c, s, KB: gl.constexpr, L4: gl.constexpr):
    """Sums [KB, 128] as [KB, 32, 2, 2] (lane, row half, activation) times their rows' scales."""
    c4 = gl.convert_layout(gl.reshape(c, [KB, 32, 2, 2]), L4)
    return c4 * gl.expand_dims(s.to(gl.float32), 3)


@gluon.jit
def _few(
    x, words, scale, zero, y, count, rows, blocks, groups, factor,
    GROUP: gl.constexpr, FLOATING: gl.constexpr, KB: gl.constexpr, ONCE: gl.constexpr,
    EVEN: gl.constexpr, WARPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    L2: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    L4: gl.constexpr = gl.BlockedLayout([1, 1, 2, 2], [1, 32, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    first = gl.program_id(0) * 8
    tile = gl.program_id(1)
    w, z, z8, s0, s1, s2, s3 = _read(
        words, scale, zero, tile, 0, blocks, groups, GROUP, KB, EVEN, L2, L4
    )
    k = gl.arange(0, KB, gl.SliceLayout(1, L2))
    word = gl.arange(0, 128, gl.SliceLayout(0, L2))
    lane, i = word // 4, word % 4
    place = i // 2 * 8 + lane % 4 * 2 + i % 2 if GROUP == 16 else lane % 4 * 4 + i
    one = first + lane // 4
    total = gl.zeros([KB, 32, 2, 2], gl.float32, L4)
    if EARLY:
        gdc_wait()
    for block in range(0, blocks, KB):  # what the next turn needs is read before this one's sums
        inside = (one < count)[None, :] & (k >= 0)[:, None]
        if not EVEN:
            inside = inside & (block + k < blocks)[:, None]
        pair = x + (first * blocks + block) * 32
        pair = pair + (k.to(gl.int64)[:, None] * 32 + (lane // 4 * blocks * 32 + place)[None, :])
        low = gl.load(pair, inside, other=0)
        high = gl.load(pair + 16, inside, other=0)
        if not ONCE:
            w_, z_, z8_, s0_, s1_, s2_, s3_ = _read(
                words, scale, zero, tile, block + KB, blocks, groups, GROUP, KB, EVEN, L2, L4
            )
        if FLOATING:
            low = gl.inline_asm_elementwise(_TIMES_2_64, "=r,r", [low], gl.int32, True, 1)
            high = gl.inline_asm_elementwise(_TIMES_2_64, "=r,r", [high], gl.int32, True, 1)
            r0, r1, r2, r3 = gl.inline_asm_elementwise(
                _FLOATING, "=&r,=&r,=&r,=&r,r", [w],
                (gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
            )  # fmt: skip
        else:
            r0, r1, r2, r3 = gl.inline_asm_elementwise(
                _INTEGER, "=&r,=&r,=&r,=&r,r,r,r", [w, z, z8],
                (gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
            )  # fmt: skip
        if GROUP == 16:
            c0, c1, c2, c3 = gl.inline_asm_elementwise(
                _SUMS_4, _CONSTRAINTS_4, [r0, r1, r2, r3, low, high],
                (gl.float32, gl.float32, gl.float32, gl.float32), False, 4,
            )  # fmt: skip
            total += _scaled(c0, s0, KB, L4) + _scaled(c1, s1, KB, L4)
            total += _scaled(c2, s2, KB, L4) + _scaled(c3, s3, KB, L4)
        elif GROUP % 64 != 0:
            c0, c1 = gl.inline_asm_elementwise(
                _SUMS_2, _CONSTRAINTS_2, [r0, r1, r2, r3, low, high],
                (gl.float32, gl.float32), False, 4,
            )  # fmt: skip
            total += _scaled(c0, s0, KB, L4) + _scaled(c1, s1, KB, L4)
        else:
            c0 = gl.inline_asm_elementwise(
                _SUMS_1, _CONSTRAINTS_1, [r0, r1, r2, r3, low, high], gl.float32, False, 4
            )
            total += _scaled(c0, s0, KB, L4)
        if not ONCE:
            w, z, z8, s0, s1, s2, s3 = w_, z_, z8_, s0_, s1_, s2_, s3_
    result = gl.sum(total, 0) * factor
    L3: gl.constexpr = gl.SliceLayout(0, L4)
    line = gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, L3)))
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, L3)))
    odd = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    row = tile * 16 + (line // 4)[:, None, None] + (half * 8)[None, :, None]
    n = first + (line % 4 * 2)[:, None, None] + odd[None, None, :]
    to = y + n.to(gl.int64) * rows + row
    gl.store(to, result.to(y.dtype.element_ty), (row < rows) & (n < count))


def few(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    rows: int,
    *,
    group: int,
    floating: bool,
    factor: float = 1.0,
) -> torch.Tensor:
    """x [m, in] @ W.T × factor, [m, rows], in bfloat16.

    words of `fragments` (fine where `group` is 16); scale of `by_tile`, its group 16 (FP4 alone) or
    a multiple of 32. zero, by tile too, is of `packed_zero`; without it integer codes are
    relative to 8.
    """
    count, blocks = x.shape[0], words.shape[1]
    y = torch.empty(count, rows, dtype=torch.bfloat16, device=x.device)
    deep, warps = few_blocks(words.shape[0], blocks)
    soon = early(x.device)
    grid: Any = (triton.cdiv(count, ROWS_AT_ONCE), words.shape[0])
    _few[grid](
        x.view(torch.int32), words, scale, zero, y, count, rows, blocks, scale.shape[1],
        factor * (2.0**62 if floating else 1.0), group, floating,
        deep, deep >= blocks, blocks % deep == 0, warps, soon, num_warps=warps, launch_pdl=soon,
    )  # fmt: skip
    return y


def few_blocks(tiles: int, blocks: int) -> tuple[int, int]:
    """Blocks of columns that a program takes at a time, and its warps (measured on an H100)."""
    if blocks > 128:
        return 32, 8
    return (8, 4) if tiles > 1024 else (32, 4)
