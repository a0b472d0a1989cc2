"""How a tensor is cut into blocks of rows, and what needs a pass of its own over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import torch

from quantkit.schemes import NumberFormat
from quantkit.streaming.job import Piece, ShardTask, Slice, Work
from quantkit.streaming.rtn import NonFiniteError, absolute_maximum, nvfp4_global_scale
from quantkit.streaming.source import Reader, float_dtype

BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Weights a block: on a CPU the float32 copies of one fit a core's second-level cache."""

ROW_MULTIPLE = 8
"""Blocks start at multiples of this: packed zero points hold eight rows a word."""


def block_rows(part: Slice, number: NumberFormat | None, device: str) -> int:
    """Rows of a slice that are worked on at a time."""
    multiple = number.block[0] if number and number.block else ROW_MULTIPLE
    wanted = BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cuda"]) // max(part.columns, 1)
    return max(multiple, wanted // multiple * multiple)


def blocks(
    part: Slice, number: NumberFormat | None, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) of a slice, in order."""
    step = block_rows(part, number, device.type)
    for start in range(0, part.rows, step):
        yield start, min(start + step, part.rows)


class Maxima:
    """The largest magnitude of each slice, computed once by whichever thread needs it first."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: dict[tuple[str, int, int], Future[float]] = {}

    def global_scale(self, fused: Sequence[Slice], device: torch.device) -> torch.Tensor | None:
        """NVFP4's global scale [1] for slices that share one, None for no slices.

        Raises NonFiniteError.
        """
        if not fused:
            return None
        amax = max(self.largest(part, device) for part in fused)
        return nvfp4_global_scale(amax, float_dtype(fused[0])).to(device)

    def largest(self, part: Slice, device: torch.device) -> float:
        """The largest magnitude of a slice. Raises NonFiniteError."""
        key = (part.tensor.name, part.matrix, part.first)
        with self._lock:
            mine = key not in self._found
            future = self._found.setdefault(key, Future())
        if mine:
            try:
                future.set_result(_largest(part, device))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def _largest(part: Slice, device: torch.device) -> float:
    with Reader(part.tensor, device, hashed=False) as reader:
        return max(
            absolute_maximum(reader.rows(part, start, stop))
            for start, stop in blocks(part, None, device)
        )


def copy_blocks(work: Work, reader: Reader) -> Iterator[tuple[torch.Tensor, int]]:
    """All of a work's source tensor as it would be kept, block by block, with the bytes read."""
    if work.dequantized is None:
        for data in reader.whole():
            yield data, data.nbytes
    else:
        for start, stop in blocks(work.dequantized, None, reader.device):
            rows = reader.rows(work.dequantized, start, stop)
            yield rows, (stop - start) * work.dequantized.row_bytes


def tensor_bytes(data: torch.Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU."""
    return data.cpu().contiguous().view(torch.uint8).numpy().data


def nonfinite_pieces(tasks: Iterable[ShardTask], jobs: int, device: str) -> set[str]:
    """The layers, by their plan's names, that hold NaN or infinity."""
    maxima = Maxima()

    def bad(piece: Piece) -> str | None:
        try:
            maxima.largest(piece.source, torch.device(device))
        except NonFiniteError:
            return piece.layer
        return None

    pieces = [piece for task in tasks for work in task.works for piece in work.pieces]
    with ThreadPoolExecutor(jobs) as pool:
        return {layer for layer in pool.map(bad, pieces) if layer}
