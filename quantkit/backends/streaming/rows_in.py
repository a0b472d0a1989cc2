"""Read rows of a source tensor as 16- or 32-bit floats, hashing the bytes on the way.

A weight in FP8 with inverse scales a square block (DeepSeek's layout: `weight` F8_E4M3 and
`weight_scale_inv`, weight = code × scale) becomes bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType

import torch

from quantkit.backends.streaming.job import Slice
from quantkit.backends.streaming.rtn import E4M3_UNIT, decode_e4m3
from quantkit.checkpoint.directory import TensorInfo
from quantkit.checkpoint.tensors import PIECE, read_into, tensor_hash, torch_dtypes

FLOATS = ("BF16", "F16", "F32", "F8_E4M3", "F8_E8M0")
"""Dtypes whose values are looked at; others are copied as bytes."""


def float_dtype(part: Slice) -> torch.dtype:
    """The dtype of a slice's rows."""
    return torch.bfloat16 if part.scale else torch_dtypes()[part.tensor.dtype]


class RowReader:
    """One source tensor, open. With `hashed`, all of it must be read in order, and once."""

    def __init__(self, tensor: TensorInfo, device: torch.device, *, hashed: bool) -> None:
        self.tensor = tensor
        self.device = device
        self._file = os.open(tensor.file, os.O_RDONLY)
        self._hash = tensor_hash(tensor.dtype, tensor.shape) if hashed else None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._scales: torch.Tensor | None = None
        self._matrix: tuple[int, torch.Tensor] | None = None
        self._digests: dict[str, str] = {}

    def __enter__(self) -> RowReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def digests(self) -> dict[str, str]:
        """Name → digest (`Checkpoint.digest`'s rule) of the tensor, if it was `hashed`, and of its
        inverse scales."""
        own = {self.tensor.name: self._hash.hexdigest()} if self._hash else {}
        return {**own, **self._digests}

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Bytes [start, stop) of the tensor, uint8 on the CPU, good until the next read.

        Raises InputError at a short end.
        """
        if len(self._buffer) < stop - start:
            pinned = self.device.type == "cuda"
            self._buffer = torch.empty(stop - start, dtype=torch.uint8, pin_memory=pinned)
        data = self._buffer[: stop - start]
        view = data.numpy().data
        read_into(self._file, view, self.tensor, start)
        if self._hash is not None:
            self._hash.update(view)
        return data

    def whole(self) -> Iterator[torch.Tensor]:
        """All values in order, flat, a block at a time: floats as such, all else as bytes."""
        dtype = torch_dtypes()[self.tensor.dtype if self.tensor.dtype in FLOATS else "U8"]
        for start in range(0, self.tensor.bytes, PIECE):
            yield self.read(start, min(start + PIECE, self.tensor.bytes)).view(dtype)

    def rows(self, part: Slice, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the slice, [stop - start, columns], in a float dtype."""
        if part.transposed:
            matrix = self._transposed(part)[:, part.first :: part.step]
            return matrix[:, start:stop].T.contiguous()
        dtype = torch_dtypes()[self.tensor.dtype]
        first = part.matrix * self.tensor.shape[-2] + part.first + start
        row = part.columns * dtype.itemsize
        raw = self.read(first * row, (first + stop - start) * row)
        values = raw.view(dtype).view(stop - start, part.columns).to(self.device)
        if part.scale is None:
            return values
        return self._dequantized(values, part.scale, part.block, part.first + start)

    def _transposed(self, part: Slice) -> torch.Tensor:
        """Matrix [in, out] of an expert, kept while its slices are read."""
        if self._matrix is None or self._matrix[0] != part.matrix:
            self._matrix = None
            height, width = self.tensor.shape[-2:]
            dtype = torch_dtypes()[self.tensor.dtype]
            size = height * width * dtype.itemsize
            raw = self.read(part.matrix * size, (part.matrix + 1) * size)
            self._matrix = part.matrix, raw.view(dtype).view(height, width).to(self.device)
        return self._matrix[1]

    def _dequantized(
        self, codes: torch.Tensor, scale: TensorInfo, block: tuple[int, int], first: int
    ) -> torch.Tensor:
        if self._scales is None:
            with RowReader(scale, self.device, hashed=True) as reader:
                raw = reader.read(0, scale.bytes).view(torch_dtypes()[scale.dtype])
                self._scales = raw.view(scale.shape).to(self.device, torch.float32)
                self._digests = reader.digests()
        rows = torch.arange(first, first + codes.shape[0], device=self.device) // block[0]
        scales = self._scales[rows].repeat_interleave(block[1], 1)[:, : codes.shape[1]]
        values = decode_e4m3(codes).mul_(E4M3_UNIT).mul_(scales)
        return values.masked_fill_(codes.isnan(), torch.nan).to(torch.bfloat16)
