"""Do one work in a worker process: read a block of rows, quantize it, hash it, write it.

Memory is a few blocks, whatever the size of the tensor; a block fits the cache, and is read,
measured, written and hashed while it is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch

from quantkit.backends.streaming.cut import blocks
from quantkit.backends.streaming.encode import encoder
from quantkit.backends.streaming.job import (
    LayerError,
    Piece,
    Slice,
    StreamOptions,
    Work,
    WorkOrder,
    WorkRecord,
)
from quantkit.backends.streaming.rows_in import RowReader, float_dtype
from quantkit.backends.streaming.rows_out import Sink
from quantkit.backends.streaming.rtn import (
    NonFiniteError,
    absolute_maximum,
    all_finite,
    nvfp4_global_scale,
    quantize_rows,
)
from quantkit.checkpoint.tensors import torch_dtypes
from quantkit.errors import InputError

Advance = Callable[[int], None]
"""Takes the source bytes that were read."""


class Performer:
    """Does works on one device, with what it remembers between them."""

    def __init__(self, device: torch.device, options: StreamOptions, advance: Advance) -> None:
        self._device, self._options, self._advance = device, options, advance
        self._maxima: dict[Slice, float] = {}

    def answer(self, order: WorkOrder | Slice) -> tuple[int | Slice, WorkRecord | bool]:
        """An order's number and what was done; a slice and whether it is finite.

        Raises InputError where NaN or infinity is refused (`source.nonfinite`).
        """
        if isinstance(order, WorkOrder):
            return order.number, self._perform(order)
        return order, self._is_finite(order)

    def _perform(self, order: WorkOrder) -> WorkRecord:
        work, record = order.work, WorkRecord()
        with ExitStack() as stack:
            file = os.open(order.file, os.O_WRONLY)
            stack.callback(os.close, file)
            reader = stack.enter_context(RowReader(work.tensor, self._device, hashed=order.hashed))
            sinks = {
                name: Sink(file, order.places[name], *entry)
                for name, entry in work.outputs.items()
            }  # fmt: skip
            try:
                for piece in work.pieces:
                    record.layers[piece.module] = self._quantize(piece, reader, sinks)
                if work.biases:
                    self._deal_out(work, reader, sinks)
                elif not work.pieces and not self._copy(work, reader, sinks[work.tensor.name]):
                    record.notes.append(f"{work.tensor.name}, kept, holds NaN or infinite values")
            except NonFiniteError as error:
                raise self._nonfinite_error(work) from error
            record.source = reader.digests()
            record.digests = {name: sink.close() for name, sink in sinks.items()}
        return record

    def _is_finite(self, part: Slice) -> bool:
        try:
            self._largest(part)
        except NonFiniteError:
            return False
        return True

    def _quantize(self, piece: Piece, reader: RowReader, sinks: Mapping[str, Sink]) -> LayerError:
        part, number = piece.source, piece.scheme.weight
        scale = self._global_scale(piece.fused)
        encode = encoder(piece.scheme, self._options.layout, (part.rows, part.columns), scale)
        noise = signal = 0.0
        for start, stop in blocks(part, number, self._device.type):
            weight = reader.rows(part, start, stop)
            rows = quantize_rows(weight, number, clip=self._options.clip, global_scale=scale)
            noise, signal = noise + rows.noise, signal + rows.signal
            for suffix, data in encode.rows(rows):
                sinks[f"{piece.module}.{suffix}"].write(_bytes(data))
            self._advance((stop - start) * part.row_bytes)
        for suffix, data in encode.end():
            sinks[f"{piece.module}.{suffix}"].write(_bytes(data))
        return LayerError(noise, signal)

    def _copy(self, work: Work, reader: RowReader, sink: Sink) -> bool:
        """Write the tensor as it is (FP8 with inverse scales becomes bfloat16); whether all of it
        is finite."""
        finite = True
        for data, size in self._whole(work, reader):
            finite = finite and all_finite(data)
            if not finite and self._options.on_nan == "error":
                raise NonFiniteError
            sink.write(_bytes(data))
            self._advance(size)
        return finite

    def _deal_out(self, work: Work, reader: RowReader, sinks: Mapping[str, Sink]) -> None:
        """Give the bias of every layer of an expert its part. Raises NonFiniteError."""
        info = work.tensor
        values = reader.read(0, info.bytes).view(torch_dtypes()[info.dtype]).view(info.shape)
        if not all_finite(values):
            raise NonFiniteError
        for name, part in work.biases.items():
            mine = values[part.matrix, part.first :: part.step][: part.rows]
            sinks[name].write(_bytes(mine))
        self._advance(info.bytes)

    def _whole(self, work: Work, reader: RowReader) -> Iterator[tuple[torch.Tensor, int]]:
        """A work's source tensor as it would be kept, in blocks, each with the bytes it took."""
        part = work.dequantized
        if part is None:
            for data in reader.whole():
                yield data, data.nbytes
        else:
            for start, stop in blocks(part, None, self._device.type):
                yield reader.rows(part, start, stop), (stop - start) * part.row_bytes

    def _global_scale(self, fused: Sequence[Slice]) -> torch.Tensor | None:
        """NVFP4's global scale [1] for slices that share one, None for no slices."""
        if not fused:
            return None
        amax = max(self._largest(part) for part in fused)
        return nvfp4_global_scale(amax, float_dtype(fused[0])).to(self._device)

    def _largest(self, part: Slice) -> float:
        """The largest magnitude of a slice. Raises NonFiniteError."""
        if part not in self._maxima:
            with RowReader(part.tensor, self._device, hashed=False) as reader:
                self._maxima[part] = max(
                    absolute_maximum(reader.rows(part, start, stop))
                    for start, stop in blocks(part, None, self._device.type)
                )
        return self._maxima[part]

    def _nonfinite_error(self, work: Work) -> InputError:
        """The refusal that names the tensor and counts its values that are NaN or infinite."""
        with RowReader(work.tensor, self._device, hashed=False) as reader:
            count = sum(int((~data.isfinite()).sum()) for data, _ in self._whole(work, reader))
        return InputError(
            f"{work.tensor.name} in {work.tensor.file.name} holds {count} NaN or infinite values.",
            hint="download the model again, or --set on_nan=keep16 to leave such layers in 16 bit",
            code="source.nonfinite",
        )


def find_device(wanted: str, index: int) -> torch.device:
    """The device of worker `index`: `auto` and `cuda` go round all GPUs that there are."""
    gpus = torch.cuda.device_count() if wanted in ("auto", "cuda") else 0
    if gpus:
        return torch.device("cuda", index % gpus)
    return torch.device("cpu" if wanted == "auto" else wanted)


def keep_freed_memory() -> None:
    """Keep glibc from giving a block's scratch back to the kernel after each operation.

    Freeing one large allocation raises its thresholds (mallopt(3), M_TRIM_THRESHOLD): three times
    the speed.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _bytes(data: torch.Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU."""
    return data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
