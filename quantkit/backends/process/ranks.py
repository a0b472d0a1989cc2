"""One worker a device: ranks of torch.distributed that share a job's calibration samples.

The worker that the pipeline started begins one more for each device and waits for them; none of
them outlives it (`die_with_parent`). Rank 0 tells the progress, and its result is the job's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.backends.process.job import Job, JobError, JobInputError, Result

POLL_SECONDS = 0.1


def run(job: Job, events: int) -> Result:
    """Run the job's adapter once a device of `job.devices`; the result of rank 0.

    `events` is the descriptor that progress goes to. Raises the failure of the rank that failed
    first: JobError or JobInputError with its sentence.
    """
    _renumber(job.devices)
    with tempfile.TemporaryDirectory(prefix="quantkit-ranks-") as name:
        folder, started = Path(name), list[subprocess.Popen[bytes]]()
        try:
            for rank in range(len(job.devices)):
                _of_rank(job, rank, folder).write(folder / f"job-{rank}.json")
                started.append(_start(rank, folder, events if rank == 0 else None))
            failed = _failed(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if failed:
            raise _failure(failed, started, folder)
        results = [Result.read(folder / f"result-{rank}.json") for rank in range(len(started))]
    results[0].peak_rss_bytes = sum(result.peak_rss_bytes for result in results)
    return results[0]


def _of_rank(job: Job, rank: int, folder: Path) -> Job:
    """A rank's own job: it sees one device, and weights lie offloaded, once for all ranks."""
    kind = job.device.partition(":")[0]
    device = kind if kind == "cpu" else f"{kind}:{rank}"
    return replace(
        job, rank=rank, meeting=str(folder / "meeting"), device=device, placement="layerwise"
    )


def _renumber(devices: Sequence[str]) -> None:
    """Let `cuda:R` be the device of rank R, as the libraries take it."""
    if not devices[0].startswith("cuda"):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [int(device.partition(":")[2] or 0) for device in devices]
    names = visible.split(",") if visible else [str(n) for n in range(max(numbers) + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in numbers)


def _start(rank: int, folder: Path, events: int | None) -> subprocess.Popen[bytes]:
    worker = Path(__file__).with_name("worker.py")
    with Path(os.devnull).open("wb") as nothing:
        told = nothing.fileno() if events is None else events
        return subprocess.Popen(
            [sys.executable, str(worker), str(folder / f"job-{rank}.json"),
             str(folder / f"result-{rank}.json"), str(told)],
            stdin=subprocess.DEVNULL,
            pass_fds=(told,),
            env=os.environ | {"QUANTKIT_PARENT_PID": str(os.getpid())},
        )  # fmt: skip


def _failed(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The ranks that failed, once all have ended or some have: the others would wait in vain."""
    while True:
        states = [process.poll() for process in started]
        if None not in states or any(states):
            return [rank for rank, status in enumerate(states) if status]
        time.sleep(POLL_SECONDS)


def _failure(failed: list[int], started: Sequence[Any], folder: Path) -> Exception:
    """What the rank says that failed first; of one that says nothing, how it ended."""
    told = {rank: folder / f"result-{rank}.json" for rank in failed}
    there = sorted((file for file in told.values() if file.is_file()), key=os.path.getmtime)
    with suppress(OSError, ValueError, KeyError):
        error = json.loads(there[0].read_text())["error"] if there else None
        if error:
            kind = JobInputError if error["kind"] == "input" else JobError
            return kind(error["message"], hint=error["hint"] or "read the log", code=error["code"])
    rank = failed[0]
    return JobError(
        f"The process of device {rank} ended with status {started[rank].returncode}.",
        hint="read the log, then run the command again",
        code="worker.failed",
    )
