"""Quantize a checkpoint without a model, shard by shard, in memory that does not grow with it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, log10, sqrt
from pathlib import Path
from time import perf_counter
from typing import Literal

from quantkit.backends.streaming.crew import Crew, hands
from quantkit.backends.streaming.execute import run_tasks
from quantkit.backends.streaming.hashing import HashAhead
from quantkit.backends.streaming.job import (
    WRITING,
    ShardRecord,
    ShardTask,
    Slice,
    StreamOptions,
    StreamResult,
    WorkRecord,
)
from quantkit.backends.streaming.ray_executor import run_on_ray
from quantkit.backends.streaming.resources import worker_count
from quantkit.backends.streaming.resume import State, finished_shards, settings, source_identity
from quantkit.backends.streaming.tasks import plan_shards
from quantkit.checkpoint.directory import INDEX_SUFFIX, Checkpoint, TensorInfo
from quantkit.checkpoint.network.modules import expert_groups, fused_groups
from quantkit.checkpoint.progress import Progress
from quantkit.checkpoint.schemes import Scheme
from quantkit.errors import InputError


def stream_quantize(
    checkpoint: Checkpoint,
    layers: Mapping[str, Scheme],
    out: Path,
    *,
    options: StreamOptions,
    shard_size: int,
    jobs: int | None = None,
    memory: int | None = None,
    executor: Literal["local", "ray"] = "local",
    resume: bool = False,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> StreamResult:
    """Write the shards and the index of `checkpoint`, quantized, into the directory `out`.

    `layers` gives modules of the source their schemes; all else is copied. `jobs` is the number of
    worker processes (default: one a core), `memory` a limit in bytes that may lower it (default: a
    few hundred MB and the largest tensor, unless `jobs` is given). `resume` goes on where an
    earlier run into the same `out` stopped; what that needs stays in `out` until `clear_state`.
    `on_progress` gets the source bytes done, and in all.

    Raises InputError (`stream.*`, `source.*`, `resume.*`, `output.no_space`), and BackendError when
    a worker was lost.
    """
    seconds: dict[str, float] = {}
    tasks = plan_shards(checkpoint, layers, options.layout, shard_size)
    count = worker_count(tasks, options.layout, jobs, memory)
    kept: dict[str, str] = {}
    state = State(out)
    with hands(1 if executor == "ray" else count, device, options) as crew:
        with _stage(seconds, "start"), HashAhead(_sources(tasks)) as ahead:
            crew.start()
        if options.on_nan == "keep16":
            with _stage(seconds, "scan"):
                kept = _nonfinite_layers(crew, tasks, layers)
            layers = {name: scheme for name, scheme in layers.items() if name not in kept}
            tasks = plan_shards(checkpoint, layers, options.layout, shard_size)
        job = {"settings": settings(layers, options, tasks), "source": source_identity(checkpoint)}
        with _stage(seconds, "check"):
            records = finished_shards(state, job, checkpoint, tasks) if resume else {}
        resumed = sorted(records)
        if not records:
            state.begin(job)
        _remove_unfinished(out)
        left = [task for task in tasks if task.file not in records]
        total = sum(task.read_bytes for task in tasks)
        before = total - sum(task.read_bytes for task in left)

        def progress(done: int) -> None:
            if on_progress:
                on_progress(before + done, total)

        def finished(record: ShardRecord) -> None:
            state.record(record)
            records[record.file] = record

        with _stage(seconds, "stream"):
            try:
                if executor == "ray":
                    run_on_ray(left, out, options, count, device, progress, finished)
                else:
                    run_tasks(crew, left, out, ahead.digests, progress, finished)
            except OSError as error:
                raise _explained(error, out, [t for t in left if t.file not in records]) from error
    _remove_unfinished(out)
    _write_index(tasks, out)
    done = WorkRecord()
    for task in tasks:
        done.take(records[task.file].done)
    return _result(done, kept, resumed, seconds, crew.memory.peak)


def clear_state(out: Path) -> None:
    """Remove what `resume` would need; the output is complete."""
    State(out).clear()


def _sources(tasks: Sequence[ShardTask]) -> Iterator[TensorInfo]:
    return (work.tensor for task in tasks for work in task.works)


def _nonfinite_layers(
    crew: Crew, tasks: Sequence[ShardTask], layers: Mapping[str, Scheme]
) -> dict[str, str]:
    """Layer → why it stays in 16 bit: it, or one that must have the same scheme, holds NaN."""
    pieces = [piece for task in tasks for work in task.works for piece in work.pieces]
    owner = {piece.source: piece.layer for piece in pieces}
    bad: set[str] = set()

    def answered(part: Slice, finite: bool) -> None:
        if not finite:
            bad.add(owner[part])

    crew.do(owner, answered)
    kept = dict.fromkeys(sorted(bad), "holds NaN or infinite values")
    for group in [*fused_groups(layers), *expert_groups(layers)]:
        culprit = next((name for name in group if name in bad), None)
        for name in group:
            if culprit:
                kept.setdefault(name, f"goes with {culprit}, which holds NaN or infinite values")
    return kept


def _result(
    done: WorkRecord,
    kept: dict[str, str],
    resumed: list[str],
    seconds: dict[str, float],
    peak_memory: int,
) -> StreamResult:
    relative = {
        name: sqrt(error.noise / error.signal) if error.signal else 0.0
        for name, error in done.layers.items()
    }
    return StreamResult(
        digests=done.digests,
        source_digests=done.source,
        relative_error=relative,
        sqnr_db={name: -20 * log10(r) if r else inf for name, r in relative.items()},
        kept=kept,
        notes=done.notes,
        seconds=seconds,
        resumed=resumed,
        peak_memory=peak_memory,
    )


def _remove_unfinished(out: Path) -> None:
    """What killed runs, or workers that were lost, left behind."""
    for stray in out.glob(f"*{WRITING}"):
        stray.unlink()


def _write_index(tasks: Sequence[ShardTask], out: Path) -> None:
    if len(tasks) == 1:
        return
    weight_map = {name: task.file for task in tasks for name in task.outputs}
    index = {
        "metadata": {"total_size": sum(task.write_bytes for task in tasks)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = json.dumps(index, indent=2) + "\n"
    (out / f"model{INDEX_SUFFIX}").write_text(text, encoding="utf-8")


def _explained(error: OSError, out: Path, left: Sequence[ShardTask]) -> Exception:
    """A full disk, with what is missing; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    needed = sum(task.write_bytes for task in left)
    free = shutil.disk_usage(out).free
    return InputError(
        f"No space is left under {out}: {len(left)} of its files still need {needed / 1e6:.0f} MB, "
        f"{free / 1e6:.0f} MB are free ({max(needed - free, 0) / 1e6:.0f} MB missing). "
        "Finished files are kept.",
        hint="free some space, then run the same command with --resume",
        code="output.no_space",
    )


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = perf_counter()
    yield
    seconds[name] = perf_counter() - began
