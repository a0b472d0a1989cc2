"""Four-bit weights by a few rows of activations, from packed weights straight to the tensor cores.

A program takes one tile of the weight, 16 rows over all columns. It asks for as much of it as its
shared memory holds before it waits for the kernel that computes the activations, so that memory is
busy while that one ends; what follows is asked for as soon as there is room.

Gluon is Triton's language with the lanes' places spelled out, which the instruction depends on.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.runtime.triton.dependent_launch import early

ROWS_AT_ONCE = 8
"""Rows of the activations that one instruction takes."""

MOST_PARTS = 4
"""How many times as many a program takes, if there are."""


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
def _scales(own, first, PART: gl.constexpr, GROUP: gl.constexpr,
            BLOCKS: gl.constexpr, KB: gl.constexpr, L4: gl.constexpr):  # fmt: skip
    """Scales [KB, 32, 2] of a lane's two rows for columns 64 (first …) + PART …; past the end 0."""
    L3: gl.constexpr = gl.SliceLayout(3, L4)
    k = first + gl.arange(0, KB, gl.SliceLayout(1, gl.SliceLayout(2, L3)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, L3)))
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    group = (k * 64 + PART) // GROUP
    at = group[:, None, None] * 16 + (lane // 4 * 2)[None, :, None] + half[None, None, :]
    there = (k < BLOCKS)[:, None, None] & (lane >= 0)[None, :, None]
    return gl.load(own + at, there, other=0.0)


@gluon.jit
def _all_scales(own, first, GROUP: gl.constexpr, BLOCKS: gl.constexpr,
                KB: gl.constexpr, L4: gl.constexpr):  # fmt: skip
    """The scales of up to four parts of a block, by how many groups lie in one."""
    found = (_scales(own, first, 0, GROUP, BLOCKS, KB, L4),)
    if GROUP == 16:
        found += (
            _scales(own, first, 16, GROUP, BLOCKS, KB, L4),
            _scales(own, first, 32, GROUP, BLOCKS, KB, L4),
            _scales(own, first, 48, GROUP, BLOCKS, KB, L4),
        )  # type: ignore[assignment]
    elif GROUP % 64 != 0:
        found += (_scales(own, first, 32, GROUP, BLOCKS, KB, L4),)  # type: ignore[assignment]
    return found


@gluon.jit
def _zeros(zero, tile, first, groups, GROUP: gl.constexpr, BLOCKS: gl.constexpr,
           KB: gl.constexpr, L2: gl.constexpr):  # fmt: skip
    """`packed_zero` of a word's rows r and r + 8; without zero points those of codes less 8."""
    z = gl.full([KB, 128], -1022835960, gl.int32, L2)
    z8 = z
    if zero is not None:
        k = first + gl.arange(0, KB, gl.SliceLayout(1, L2))
        word = gl.arange(0, 128, gl.SliceLayout(0, L2))
        group = (k[:, None] * 64 + (word % 4 // 2 * 32)[None, :]) // GROUP
        place = zero + (tile * groups + group) * 16 + (word // 16 * 2)[None, :]
        there = (k < BLOCKS)[:, None] & (word >= 0)[None, :]
        z = gl.load(place, there, other=0)
        z8 = gl.load(place + 1, there, other=0)
    return z, z8


@gluon.jit
def _copy(ring, words, tile, stage, BLOCKS: gl.constexpr, KB: gl.constexpr,
          DEPTH: gl.constexpr, L2: gl.constexpr):  # fmt: skip
    """Ask for the words of a stage, KB blocks of columns; past the end for nothing."""
    k = gl.arange(0, KB, gl.SliceLayout(1, L2)) + stage * KB
    word = gl.arange(0, 128, gl.SliceLayout(0, L2))
    at = words + tile.to(gl.int64) * (BLOCKS * 128) + (k[:, None] * 128 + word[None, :])
    there = (k < BLOCKS)[:, None] & (word >= 0)[None, :]
    async_copy.async_copy_global_to_shared(ring.index(stage % DEPTH), at, there)
    async_copy.commit_group()


@gluon.jit
def _to_cache(start, size, LINES: gl.constexpr, WARPS: gl.constexpr):
    """Ask for `size` bytes to come to the second-level cache."""
    lines: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    at = gl.minimum(gl.arange(0, LINES, lines) * 128, size - 1)
    place = start.to(gl.pointer_type(gl.int8)) + at
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], gl.int32, False, 1
    )


@gluon.jit
def _activations(x, count, first, stage, BLOCKS: gl.constexpr, GROUP: gl.constexpr,
                 PARTS: gl.constexpr, KB: gl.constexpr, L2: gl.constexpr):  # fmt: skip
    """A lane's pairs of every eight rows for a stage, (low, high) [KB, 128]; past the end 0."""
    k = gl.arange(0, KB, gl.SliceLayout(1, L2)) + stage * KB
    word = gl.arange(0, 128, gl.SliceLayout(0, L2))
    lane, i = word // 4, word % 4
    place = i // 2 * 8 + lane % 4 * 2 + i % 2 if GROUP == 16 else lane % 4 * 4 + i
    found = ()
    for part in gl.static_range(PARTS):
        one = first + part * 8 + lane // 4
        inside = (one < count)[None, :] & (k < BLOCKS)[:, None]
        at = x + k[:, None] * 32 + (one * (BLOCKS * 32) + place)[None, :]
        pair = (gl.load(at, inside, other=0), gl.load(at + 16, inside, other=0))
        found += (pair,)  # type: ignore[assignment]
    return found


@gluon.jit
def _scaled(c, s, KB: gl.constexpr, WARPS: gl.constexpr, L4: gl.constexpr):
    """Sums [KB, 128] of (lane, row half, activation) by the rows' scales, [WARPS, 32, 2, 2]."""
    c4 = gl.convert_layout(gl.reshape(c, [KB, 32, 2, 2]), L4)
    return _within(c4 * gl.expand_dims(s.to(gl.float32), 3), KB, WARPS)


@gluon.jit
def _within(sums, KB: gl.constexpr, WARPS: gl.constexpr):
    """[KB, 32, 2, 2] added up within each warp, [WARPS, 32, 2, 2]."""
    return gl.sum(gl.reshape(sums, [KB // WARPS, WARPS, 32, 2, 2]), 0)


@gluon.jit
def _products(r0, r1, r2, r3, low, high, scales, GROUP: gl.constexpr, KB: gl.constexpr,
              WARPS: gl.constexpr, L4: gl.constexpr):  # fmt: skip
    """Weights [KB, 128] by eight rows of activations, scaled and added up within a warp."""
    if GROUP == 16:
        c0, c1, c2, c3 = gl.inline_asm_elementwise(
            _SUMS_4, _CONSTRAINTS_4, [r0, r1, r2, r3, low, high],
            (gl.float32, gl.float32, gl.float32, gl.float32), False, 4,
        )  # fmt: skip
        sums = _scaled(c0, scales[0], KB, WARPS, L4) + _scaled(c1, scales[1], KB, WARPS, L4)
        sums += _scaled(c2, scales[2], KB, WARPS, L4) + _scaled(c3, scales[3], KB, WARPS, L4)
    elif GROUP % 64 != 0:
        c0, c1 = gl.inline_asm_elementwise(
            _SUMS_2, _CONSTRAINTS_2, [r0, r1, r2, r3, low, high], (gl.float32, gl.float32), False, 4
        )
        sums = _scaled(c0, scales[0], KB, WARPS, L4) + _scaled(c1, scales[1], KB, WARPS, L4)
    else:
        c0 = gl.inline_asm_elementwise(
            _SUMS_1, _CONSTRAINTS_1, [r0, r1, r2, r3, low, high], gl.float32, False, 4
        )
        sums = _scaled(c0, scales[0], KB, WARPS, L4)
    return sums


@gluon.jit
def _store(y, result, tile, first, count, rows):
    """[32, 2, 2] of (lane, row half, activation) to the tile's rows of eight activations."""
    R: gl.constexpr = result.type.layout
    lane = gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, R)))
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, R)))
    odd = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, R)))
    row = tile * 16 + (lane // 4)[:, None, None] + (half * 8)[None, :, None]
    n = first + (lane % 4 * 2)[:, None, None] + odd[None, None, :]
    to = y + n.to(gl.int64) * rows + row
    gl.store(to, result.to(y.dtype.element_ty), (row < rows) & (n < count))


@gluon.jit
def _few(
    x, words, scale, zero, y, count, rows, groups, factor,
    BLOCKS: gl.constexpr, GROUP: gl.constexpr, FLOATING: gl.constexpr, PARTS: gl.constexpr,
    KB: gl.constexpr, DEPTH: gl.constexpr, WARPS: gl.constexpr, LINES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    L2: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    L4: gl.constexpr = gl.BlockedLayout([1, 1, 2, 2], [1, 32, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    STAGES: gl.constexpr = (BLOCKS + KB - 1) // KB
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    first = gl.program_id(0) * (8 * PARTS)
    tile = gl.program_id(1)
    ring = gl.allocate_shared_memory(gl.int32, [DEPTH, KB, 128], PLAIN)
    for stage in gl.static_range(DEPTH):
        _copy(ring, words, tile, stage, BLOCKS, KB, DEPTH, L2)
    own = scale + tile.to(gl.int64) * groups * 16
    size = groups * (16 * scale.dtype.element_ty.primitive_bitwidth // 8)
    _to_cache(own, size, LINES, WARPS)
    s = _all_scales(own, 0, GROUP, BLOCKS, KB, L4)
    nothing = gl.zeros([KB, 32, 2, 2], gl.float32, L4)
    totals = ()
    for _ in gl.static_range(PARTS):
        totals += (_within(nothing, KB, WARPS),)  # type: ignore[assignment]
    if EARLY:
        gdc_wait()
    pairs = _activations(x, count, first, 0, BLOCKS, GROUP, PARTS, KB, L2)
    for stage in range(STAGES):
        zeros = _zeros(zero, tile, stage * KB, groups, GROUP, BLOCKS, KB, L2)
        if PARTS == 1:
            next_pairs = _activations(x, count, first, stage + 1, BLOCKS, GROUP, PARTS, KB, L2)
        else:  # to hold more would take too many registers
            pairs = _activations(x, count, first, stage, BLOCKS, GROUP, PARTS, KB, L2)
            next_pairs = pairs
        next_s = _all_scales(own, (stage + 1) * KB, GROUP, BLOCKS, KB, L4)
        async_copy.wait_group(DEPTH - 1)
        w = ring.index(stage % DEPTH).load(L2)
        if DEPTH < STAGES:
            _copy(ring, words, tile, stage + DEPTH, BLOCKS, KB, DEPTH, L2)
        else:
            async_copy.commit_group()
        if FLOATING:
            r0, r1, r2, r3 = gl.inline_asm_elementwise(
                _FLOATING, "=&r,=&r,=&r,=&r,r", [w],
                (gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
            )  # fmt: skip
        else:
            r0, r1, r2, r3 = gl.inline_asm_elementwise(
                _INTEGER, "=&r,=&r,=&r,=&r,r,r,r", [w, zeros[0], zeros[1]],
                (gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
            )  # fmt: skip
        added = ()
        for part in gl.static_range(PARTS):
            low, high = pairs[part]
            if FLOATING:
                low = gl.inline_asm_elementwise(_TIMES_2_64, "=r,r", [low], gl.int32, True, 1)
                high = gl.inline_asm_elementwise(_TIMES_2_64, "=r,r", [high], gl.int32, True, 1)
            sums = _products(r0, r1, r2, r3, low, high, s, GROUP, KB, WARPS, L4)
            added += (totals[part] + sums,)  # type: ignore[assignment]
        totals = added
        pairs, s = next_pairs, next_s
    for part in gl.static_range(PARTS):
        _store(y, gl.sum(totals[part], 0) * factor, tile, first + part * 8, count, rows)


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
    parts = min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(count, ROWS_AT_ONCE)))
    deep, held, warps = blocks_at_once(blocks, parts, floating)
    lines = triton.next_power_of_2(triton.cdiv(scale[0].nbytes, 128))
    soon = early(x.device)
    grid: Any = (triton.cdiv(count, ROWS_AT_ONCE * parts), words.shape[0])
    _few[grid](
        x.view(torch.int32), words, scale, zero, y, count, rows, scale.shape[1],
        factor * (2.0**62 if floating else 1.0), blocks, group, floating, parts,
        deep, held, warps, lines, soon, num_warps=warps, launch_pdl=soon,
    )  # fmt: skip
    return y


def blocks_at_once(blocks: int, parts: int, floating: bool) -> tuple[int, int, int]:
    """Blocks of columns in a stage, stages held at a time, and warps (measured on an H100)."""
    warps = 8 if blocks > 128 else 4
    if parts > 1:
        stage, held = 8, 12
    elif blocks > 128:
        stage, held = (16, 4) if floating else (32, 3)
    else:
        stage, held = 16, 2
    stage = max(warps, min(stage, triton.next_power_of_2(blocks)))
    return stage, min(triton.cdiv(blocks, stage), held), warps
