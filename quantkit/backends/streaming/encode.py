"""Quantized rows as the tensors of a layout: what a layer will hold, and its bytes block by block.

Layouts: compressed-tensors 0.19 (float-, int-, pack-, nvfp4-pack-, mxfp4-pack- and
mxfp8-quantized), GPTQ (v1: stored zero points are one less) and AWQ's GEMM layout, both 4 bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from quantkit.backends.streaming.job import Layout, Outputs
from quantkit.checkpoint.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.backends.streaming.rtn import Rows

Chunk = tuple[str, "torch.Tensor"]
"""A tensor's suffix and its next bytes."""


def refusal(scheme: Scheme, layout: Layout, shape: tuple[int, int]) -> str | None:
    """Why a weight of `shape` [out, in] cannot be stored so, or None."""
    number = scheme.weight
    if scheme.input is not None and not scheme.input.dynamic:
        return f"{scheme.name} has static activation scales, which need calibration"
    if number.element not in ("int4", "int8", "fp8_e4m3", "fp4_e2m1"):
        return f"{scheme.name}: {number.element} is not written here"
    if number.granularity not in ("channel", "group", "block"):
        return f"{scheme.name}: one scale a {number.granularity} is not written here"
    if number.group_size and shape[1] % number.group_size:
        return f"group size {number.group_size} does not divide its {shape[1]} inputs"
    if layout == "compressed-tensors":
        return None
    if number.element != "int4" or number.granularity != "group" or scheme.input is not None:
        return f"the {layout} layout holds w4a16 only, not {scheme.name}"
    if number.symmetric != (layout == "gptq"):
        return f"engines load the {layout} layout {_ZEROS[layout]} only"
    if shape[0] % 8:
        return f"the {layout} layout packs outputs in eights, and it has {shape[0]}"
    return None


def declared(scheme: Scheme, layout: Layout, shape: tuple[int, int], dtype: str) -> Outputs:
    """Suffix → dtype and shape of what a weight of `shape` in `dtype` becomes."""
    number, (rows, columns) = scheme.weight, shape
    grid = number.scale_shape(shape)
    if layout != "compressed-tensors":
        packed = (columns // 8, rows) if layout == "gptq" else (columns, rows // 8)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "qweight": ("I32", packed),
            "qzeros": ("I32", (grid[1], rows // 8)),
            "scales": (dtype, (grid[1], rows)),
        }
        return tensors | ({"g_idx": ("I32", (columns,))} if layout == "gptq" else {})
    if number.element == "fp4_e2m1":
        tensors = {"weight_packed": ("U8", (rows, columns // 2))}
        if number.scale == "e8m0":
            return tensors | {"weight_scale": ("U8", grid)}
        return tensors | {
            "weight_scale": ("F8_E4M3", grid),
            "weight_global_scale": ("F32", (1,)),
        }
    if number.element == "fp8_e4m3":
        scale = "U8" if number.scale == "e8m0" else dtype
        return {"weight": ("F8_E4M3", shape), "weight_scale": (scale, grid)}
    if scheme.input is not None:
        return {"weight": ("I8", shape), "weight_scale": (dtype, grid)}
    tensors = {
        "weight_packed": ("I32", (rows, (columns * number.bits + 31) // 32)),
        "weight_scale": (dtype, grid),
        "weight_shape": ("I64", (2,)),
    }
    if not number.symmetric:
        tensors["weight_zero_point"] = ("I32", ((rows * number.bits + 31) // 32, grid[1]))
    return tensors


_ZEROS = {"gptq": "without zero points (symmetric=true)", "awq": "with them (symmetric=false)"}


class Encoder(Protocol):
    """Turns blocks of rows, in order, into chunks; `end` gives what needs them all."""

    def rows(self, block: Rows) -> Iterator[Chunk]: ...

    def end(self) -> Iterator[Chunk]: ...


def encoder(
    scheme: Scheme, layout: Layout, shape: tuple[int, int], global_scale: torch.Tensor | None
) -> Encoder:
    """The encoder of one layer; `global_scale` is NVFP4's."""
    if layout == "compressed-tensors":
        return _CompressedTensors(scheme, shape, global_scale)
    return _Columns(scheme, layout, shape)


class _CompressedTensors:
    def __init__(
        self, scheme: Scheme, shape: tuple[int, int], global_scale: torch.Tensor | None
    ) -> None:
        self._scheme, self._shape, self._global = scheme, shape, global_scale
        self._packs = scheme.weight.is_int and scheme.input is None

    def rows(self, block: Rows) -> Iterator[Chunk]:
        from quantkit.formats.packing import pack_nibbles, pack_words

        bits = self._scheme.weight.bits
        if self._packs:
            yield "weight_packed", pack_words(_unsigned(block.codes, bits), bits)
        elif self._scheme.weight.element == "fp4_e2m1":
            yield "weight_packed", pack_nibbles(block.codes)
        else:
            yield "weight", block.codes
        yield "weight_scale", block.scale
        if block.zero_point is not None:
            words = pack_words(_unsigned(block.zero_point, bits).T, bits)
            yield "weight_zero_point", words.T.contiguous()

    def end(self) -> Iterator[Chunk]:
        import torch

        if self._packs:
            yield "weight_shape", torch.tensor(self._shape)
        if self._global is not None:
            yield "weight_global_scale", self._global


_GPTQ_ZEROS = 0x77777777
"""Eight zero points of 8, less one each."""


class _Columns:
    """GPTQ and AWQ keep a layer's rows in columns, so the packed layer is gathered in memory."""

    def __init__(self, scheme: Scheme, layout: Layout, shape: tuple[int, int]) -> None:
        import torch

        self._layout, self._number = layout, scheme.weight
        entries = declared(scheme, layout, shape, "")
        self._columns, self._row = shape[1], 0
        self._packed = torch.empty(entries["qweight"][1], dtype=torch.int32)
        self._zeros = torch.full(entries["qzeros"][1], _GPTQ_ZEROS, dtype=torch.int32)
        self._scales: list[torch.Tensor] = []

    def rows(self, block: Rows) -> Iterator[Chunk]:
        from quantkit.formats.packing import pack_awq, pack_words

        codes = _unsigned(block.codes, 4).cpu()
        start, stop = self._row, self._row + codes.shape[0]
        words = slice(start // 8, stop // 8)
        self._row = stop
        self._scales.append(block.scale.cpu())
        if block.zero_point is None:
            self._packed[:, start:stop] = pack_words(codes, 4).T
        else:
            self._packed[:, words] = pack_awq(codes.T)
            self._zeros[:, words] = pack_awq(_unsigned(block.zero_point, 4).cpu().T)
        return iter(())

    def end(self) -> Iterator[Chunk]:
        import torch

        yield "qweight", self._packed
        yield "qzeros", self._zeros
        yield "scales", torch.cat(self._scales).T
        if self._layout == "gptq":
            assert self._number.group_size
            yield "g_idx", torch.arange(self._columns, dtype=torch.int32) // self._number.group_size


def _unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes centred on 0 → uint8 codes from 0."""
    import torch

    return codes.bitwise_xor(-128).view(torch.uint8) if bits == 8 else (codes + 8).view(torch.uint8)
