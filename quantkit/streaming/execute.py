"""Run shard tasks on threads of this process: read a block, quantize it, hash it, write it.

A thread takes one source tensor at a time and goes through it in blocks of rows that fit the cache;
torch runs single-threaded inside a block. Reading, computing and writing of different tensors
overlap. Memory is a few blocks a thread, whatever the size of the tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from threading import Event, Lock, Thread

import torch

from quantkit.errors import InputError
from quantkit.streaming.blocks import Maxima, blocks, copy_blocks, tensor_bytes
from quantkit.streaming.encode import encoder
from quantkit.streaming.job import (
    WRITING,
    LayerError,
    Piece,
    ShardRecord,
    ShardTask,
    StreamOptions,
    Work,
)
from quantkit.streaming.rtn import NonFiniteError, all_finite, quantize_rows
from quantkit.streaming.source import Reader
from quantkit.streaming.writer import ShardWriter, Sink

TICK = 0.05
Finished = Callable[[ShardRecord], None]
Progress = Callable[[int], None]


class Stopped(Exception):  # noqa: N818
    """Another thread failed, or the user interrupted."""


def run_tasks(
    tasks: Sequence[ShardTask],
    out: Path,
    options: StreamOptions,
    *,
    jobs: int,
    devices: Sequence[str],
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> None:
    """Write every task's file into `out`, on `jobs` threads that share the devices in turn.

    `progress` gets the source bytes done, from this thread; `finished` gets each file's record once
    the file has its final name. The first failure stops all threads and is raised.
    """
    run = _Run(tasks, out, options, finished)
    threads = [
        Thread(target=run.loop, args=(torch.device(devices[i % len(devices)]),), daemon=True)
        for i in range(jobs)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed_memory()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(TICK)
                if progress:
                    progress(run.done)
    finally:
        run.stop.set()
        for thread in threads:
            thread.join()
        run.abandon()
        torch.set_num_threads(before)
    if run.error:
        raise run.error


def _keep_freed_memory() -> None:
    """Keep glibc from giving a block's scratch back to the kernel after each operation.

    Freeing one large allocation raises its thresholds (mallopt(3), M_TRIM_THRESHOLD): three times
    the speed.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


class _Shard:
    """A task under way: opened by its first work, given its final name by its last."""

    def __init__(self, task: ShardTask, out: Path) -> None:
        self.task = task
        self.record = ShardRecord(task.file, 0)
        self.left = len(task.works)
        self._final = out / task.file
        self._writer: ShardWriter | None = None

    def sinks(self, work: Work) -> dict[str, Sink]:
        if self._writer is None:
            place = self._final.with_suffix(f".{token_hex(4)}{WRITING}")
            self._writer = ShardWriter(place, self.task.outputs)
        return {name: self._writer.sink(name) for name in work.outputs}

    def finish(self) -> ShardRecord:
        assert self._writer is not None
        self.record.size = self._writer.size
        self._writer.close()
        self._writer.path.rename(self._final)
        self._writer = None
        return self.record

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer.path.unlink(missing_ok=True)


class _Run:
    """What the threads share."""

    def __init__(
        self,
        tasks: Sequence[ShardTask],
        out: Path,
        options: StreamOptions,
        finished: Finished | None,
    ) -> None:
        self.stop = Event()
        self.error: BaseException | None = None
        self.done = 0
        self._options = options
        self._finished = finished
        self._lock = Lock()
        self._shards = [_Shard(task, out) for task in tasks]
        self._queue = deque((shard, work) for shard in self._shards for work in shard.task.works)
        self._maxima = Maxima()

    def loop(self, device: torch.device) -> None:
        """Take works until none is left or somebody failed."""
        try:
            with torch.inference_mode():
                while (taken := self._take()) is not None:
                    self._do(*taken, device)
                    self._done(taken[0])
        except Stopped:
            return
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.stop.set()

    def abandon(self) -> None:
        """Remove what unfinished shards have written."""
        for shard in self._shards:
            shard.abandon()

    def _take(self) -> tuple[_Shard, Work] | None:
        with self._lock:
            return self._queue.popleft() if self._queue else None

    def _done(self, shard: _Shard) -> None:
        with self._lock:
            shard.left -= 1
            if not shard.left:
                record = shard.finish()
                if self._finished:
                    self._finished(record)

    def _advance(self, count: int) -> None:
        """Count source bytes, and leave when the run is over."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self.done += count

    def _do(self, shard: _Shard, work: Work, device: torch.device) -> None:
        with self._lock:
            sinks = shard.sinks(work)
        with Reader(work.tensor, device, hashed=True) as reader:
            try:
                for piece in work.pieces:
                    shard.record.layers[piece.module] = self._quantize(piece, reader, sinks)
                if not work.pieces and not self._copy(work, reader, sinks[work.tensor.name]):
                    shard.record.notes.append(f"{work.tensor.name}, kept, holds NaN or infinity")
            except NonFiniteError as error:
                raise nonfinite_error(work) from error
            shard.record.source.update(reader.digests())
        shard.record.digests.update({name: sink.digest() for name, sink in sinks.items()})

    def _quantize(self, piece: Piece, reader: Reader, sinks: Mapping[str, Sink]) -> LayerError:
        part, number = piece.source, piece.scheme.weight
        scale = self._maxima.global_scale(piece.fused, reader.device)
        encode = encoder(piece.scheme, self._options.layout, (part.rows, part.columns), scale)
        noise = signal = 0.0
        for start, stop in blocks(part, number, reader.device):
            weight = reader.rows(part, start, stop)
            rows = quantize_rows(weight, number, clip=self._options.clip, global_scale=scale)
            noise, signal = noise + rows.noise, signal + rows.signal
            for suffix, data in encode.rows(rows):
                sinks[f"{piece.module}.{suffix}"].write(tensor_bytes(data))
            self._advance((stop - start) * part.row_bytes)
        for suffix, data in encode.end():
            sinks[f"{piece.module}.{suffix}"].write(tensor_bytes(data))
        return LayerError(noise, signal)

    def _copy(self, work: Work, reader: Reader, sink: Sink) -> bool:
        """Write the tensor as it is (FP8 with inverse scales becomes bfloat16); whether all of it
        is finite."""
        finite = True
        for data, size in copy_blocks(work, reader):
            finite = finite and all_finite(data)
            if not finite and self._options.on_nan == "error":
                raise NonFiniteError
            sink.write(tensor_bytes(data))
            self._advance(size)
        return finite


def nonfinite_error(work: Work) -> InputError:
    """The refusal that names the tensor and counts its values that are NaN or infinite."""
    with Reader(work.tensor, torch.device("cpu"), hashed=False) as reader:
        count = sum(int((~data.isfinite()).sum()) for data, _ in copy_blocks(work, reader))
    return InputError(
        f"{work.tensor.name} in {work.tensor.file.name} holds {count} NaN or infinite values.",
        hint="download the model again, or --set on_nan=keep16 to leave such layers in 16 bit",
        code="source.nonfinite",
    )
