"""`sweep`: every cell of a file, here or on a Ray cluster, and the leaderboard of all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.backends.child_process import Child
from quantkit.backends.environments.device import resolve_device
from quantkit.backends.process.job import Reporter
from quantkit.errors import InputError, command
from quantkit.pipeline.publish import check_apart
from quantkit.validation.reports.html import require_matplotlib
from quantkit.validation.sweep.against import Worse, compared, read_earlier
from quantkit.validation.sweep.cell import CellJob, finished, run_cell
from quantkit.validation.sweep.file import Cell, SweepFile, data_file, read_sweep
from quantkit.validation.sweep.leaderboard import Row, document, write_all

CELLS = "cells"
Done = Callable[[int, dict[str, Any]], None]
"""Told the number of a cell that ended, and its record."""


@dataclass(frozen=True)
class SweepRequest:
    """One `quantkit sweep`: `jobs` cells at a time here (RAY_ADDRESS: on that cluster)."""

    file: Path
    out: Path
    resume: bool = False
    against: Path | None = None
    jobs: int = 1
    device: str = "auto"


@dataclass(frozen=True)
class SweepReport:
    """The rows in the file's order, and what became worse than in an earlier sweep."""

    rows: tuple[Row, ...]
    worse: tuple[Worse, ...]
    notes: tuple[str, ...]
    out: Path

    @property
    def failed(self) -> list[Row]:
        """Cells that have no result."""
        return [row for row in self.rows if row.status == "failed"]

    @property
    def ok(self) -> bool:
        """Whether every cell has a result, every gate held and nothing became worse."""
        return not self.worse and all(row.status == "ok" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The document of `leaderboard.json`."""
        return document(self.rows, self.worse, self.notes)


def sweep(request: SweepRequest, ui: Reporter) -> SweepReport:
    """Run what has no result yet and write the leaderboard.

    Raises InputError before any work: for a file that is wrong, an output that holds something, an
    earlier sweep that cannot be read. A cell that fails is a row of the result.
    """
    require_matplotlib()
    asked, cells = read_sweep(request.file)
    earlier = read_earlier(request.against) if request.against else None
    check_apart(request.out, *(Path(cell.model) for cell in cells), request.file)
    with _held(request):
        jobs = [_job(request, asked, cell) for cell in cells]
        records = [finished(Path(job.folder)) for job in jobs]
        left = [number for number, found in enumerate(records) if found is None]
        ui.stage("sweep", len(cells))
        ui.advance(len(cells) - len(left))

        def done(number: int, found: dict[str, Any]) -> None:
            records[number] = found
            ended = sum(one is not None for one in records)
            ui.note(f"{ended}/{len(cells)} {cells[number].key}: {_told(found)}")
            ui.advance(ended)

        run = _on_ray if os.environ.get("RAY_ADDRESS") else _here
        run([(number, jobs[number]) for number in left], request, done)
        rows = tuple(
            Row.of(cell, found or {}, Path(job.folder))
            for cell, found, job in zip(cells, records, jobs, strict=True)
        )
        worse, notes = compared(rows, earlier) if earlier else ((), ())
        report = SweepReport(rows, worse, notes, request.out)
        write_all(report.to_json(), request.out)
    return report


def _here(cells: Sequence[tuple[int, CellJob]], request: SweepRequest, done: Done) -> None:
    """Each in a process of its own, so many at a time; an interrupt ends those that run."""
    children: list[Child] = []
    with ThreadPoolExecutor(request.jobs) as pool:
        running = {pool.submit(run_cell, job, children.append): number for number, job in cells}
        try:
            for one in as_completed(running):
                done(running[one], one.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.end()
            raise


def _on_ray(cells: Sequence[tuple[int, CellJob]], request: SweepRequest, done: Done) -> None:
    from quantkit.validation.sweep.ray_executor import run_on_ray

    run_on_ray(cells, request.device, done)


def _job(request: SweepRequest, asked: SweepFile, cell: Cell) -> CellJob:
    validation = asked.validate_
    data = data_file(request.file, asked)
    return CellJob(
        folder=str((request.out / CELLS / cell.digest).absolute()),
        model=str(Path(cell.model).absolute()),
        method=cell.method if not Path(cell.method).exists()
        else str(Path(cell.method).absolute()),
        sets=list(cell.sets),
        samples=validation.samples,
        data=str(data.absolute()) if data else None,
        tasks=validation.tasks,
        gates=validation.gates,
        throughput=validation.throughput,
        broken_baseline=validation.broken_baseline,
        device=resolve_device(request.device),
    )  # fmt: skip


def _told(found: dict[str, Any]) -> str:
    if found["status"] == "failed":
        return f"failed: {found['error']['message']}"
    kl = found["metrics"].get("kl_mean")
    share = found["weight_bytes"] / max(found["baseline_bytes"], 1)
    return f"{found['status']}, {share:.0%} of the bytes" + ("" if kl is None else f", KL {kl:.4g}")


@contextmanager
def _held(request: SweepRequest) -> Iterator[None]:
    """The output folder, to be this sweep's alone while it runs."""
    out = request.out
    if out.is_dir() and any(out.iterdir()) and not (out / CELLS).is_dir():
        raise InputError(
            f"The output {out} exists and holds no sweep.",
            hint="choose another --out",
            code="output.exists",
        )
    if (out / CELLS).is_dir() and not request.resume:
        raise InputError(
            f"{out} holds a sweep.",
            hint=command("sweep", request.file, "--out", out, "--resume"),
            code="output.exists",
        )
    try:
        (out / CELLS).mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(
            f"The output {out} cannot be written: {error.strerror}.",
            hint="choose another --out",
            code="output.not_writable",
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"Another sweep is writing to {out}.",
                hint="wait for it, or choose another --out",
                code="output.locked",
            ) from error
        yield
    finally:
        os.close(lock)
