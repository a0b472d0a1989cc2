"""The worker of a calibrating job on one node of a Ray cluster, instead of a child of this process.

The node sees model, output, tokens and the backend's interpreter under the same paths as this
machine, and has the same quantkit. The worker writes its log where it would write it here, its
progress to a file beside its output, which is read here as it grows. A node, or its process, that
is lost costs what was not in the library's checkpoints of finished layers: the job goes on from
them elsewhere, as `--resume` would.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quantkit.backends.process.job import Job, Reporter, Result, Unit
from quantkit.backends.process.parent import run_worker
from quantkit.backends.streaming.ray_executor import RETRIES, WAIT, cluster, import_ray
from quantkit.errors import BackendError, InputError

_THREADS = "OMP_NUM_THREADS"
_CANCEL_SECONDS = 10
_ERRORS = {"InputError": InputError, "BackendError": BackendError}


def cluster_room() -> Callable[[str], int | None] | None:
    """What tells the free bytes of the "host" that is the roomiest node of the cluster, nothing of
    accelerators; None where the cluster will be this machine. Raises InputError when ray is not
    installed."""
    ray = import_ray()
    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        return None
    with cluster() as (_, nodes):
        most = max((node.get("memory", 0.0) for node in nodes if node.get("CPU")), default=0.0)
    return lambda where: int(most) if where == "host" else None


def run_on_node(
    job: Job,
    *,
    python: Path,
    log: Path,
    report: Reporter,
    work: Path,
    memory: int,
    again: Callable[[], None],
) -> Result:
    """As `run_worker`, on the first node that has `memory` bytes and the job's GPUs to give.

    `work` is a folder for what is temporary. `again` makes `job.out` ready for another try after
    a node was lost, RETRIES times at most.

    Raises InputError where no node could ever take it (`ray.no_node`, `ray.device`) or a node does
    not see its paths (`ray.not_shared`), BackendError (`ray.node_lost`) after the last try, and
    what `run_worker` raises there.
    """
    job, log = _numbered(job, work), log.resolve()
    with cluster() as (ray, nodes):
        asked = resources(nodes, job, memory)
        remote = ray.remote(**asked, max_retries=0)(_on_node)
        for left in range(RETRIES, -1, -1):
            report.stage("wait for a node of the cluster")
            events = work / "events.jsonl"
            events.unlink(missing_ok=True)
            words = (str(python), str(log), str(work), str(events), os.environ.get(_THREADS))
            with _started(ray, remote.remote(asdict(job), *words)) as reference:
                lost = _follow(ray, reference, events, report)
            if lost is None:
                return _unwrap(ray.get(reference))
            if left:
                report.note(f"the node was lost ({lost}): goes on elsewhere from what is finished")
                again()
        raise BackendError(
            f"The node of {job.method} was lost {RETRIES + 1} times: {lost}.",
            hint="look at the cluster with `ray status`, then run again with --resume",
            code="ray.node_lost",
        )


def resources(nodes: Sequence[Mapping[str, float]], job: Job, memory: int) -> dict[str, int]:
    """What the task asks of Ray: all GPUs of the job or, on a CPU, the cores of a whole node; and
    `memory` bytes, or as much as the roomiest node has, where that is less."""
    kind = job.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(
            f"--executor ray gives out NVIDIA GPUs and CPUs, not {job.device}.",
            hint="--executor local, or --device cuda",
            code="ray.device",
        )
    gpus = len(job.devices) if kind == "cuda" else 0
    able = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= 1]
    if not able:
        most = int(max((node.get("GPU", 0) for node in nodes), default=0))
        raise InputError(
            f"No node of the cluster has a core and {gpus} GPU{'s' * (gpus != 1)}: the most GPUs "
            f"of one node are {most}.",
            hint="fewer --device, or `ray start` on a machine that has them",
            code="ray.no_node",
        )
    memory = min(memory, int(max(node.get("memory", 0) for node in able)))
    fitting = [int(node["CPU"]) for node in able if node.get("memory", 0) >= memory]
    return {"num_cpus": 1 if gpus else min(fitting), "num_gpus": gpus, "memory": memory}


def _numbered(job: Job, work: Path) -> Job:
    """The job with its devices as Ray numbers those that it gives, and its tokens in `work`: the
    cache of this machine is no shared path."""
    devices = job.devices or [job.device]
    if len(devices) > 1 or ":" in devices[0]:
        devices = [f"cuda:{index}" for index in range(len(devices))]
    tokens = shutil.copy(job.tokens, work / "tokens.safetensors") if job.tokens else None
    return replace(job, device=devices[0], devices=devices, tokens=str(tokens) if tokens else None)


@contextmanager
def _started(ray: Any, reference: Any) -> Iterator[Any]:
    """End the task, and the worker with it, where this process is interrupted."""
    try:
        yield reference
    except BaseException:
        ray.cancel(reference, force=True)
        ray.wait([reference], timeout=_CANCEL_SECONDS)
        raise


def _follow(ray: Any, reference: Any, events: Path, report: Reporter) -> str | None:
    """Pass progress on until the task ends; how its node was lost, or None."""
    read = 0
    while True:
        ended, _ = ray.wait([reference], timeout=WAIT)
        read = _pass_on(events, read, report)
        if ended:
            break
    errors = ray.exceptions
    try:
        ray.get(reference)
    except errors.OutOfMemoryError as error:
        raise BackendError(
            f"Ray ended the worker because its node ran out of memory: {_first(error)}",
            hint="go on with --resume --set placement=layerwise, or give the cluster a node with "
            "more memory",
            code="worker.out_of_memory",
        ) from error
    except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError,
            errors.LocalRayletDiedError) as error:  # fmt: skip
        return _first(error)
    except errors.RayError as error:
        raise BackendError(
            f"The task on the cluster failed: {str(error).strip().splitlines()[-1]}",
            hint="look at the cluster with `ray status`; its nodes need this version of quantkit",
            code="ray.failed",
        ) from error
    return None


def _pass_on(events: Path, read: int, report: Reporter) -> int:
    """Tell the whole lines of the file from byte `read` on; where the next begins."""
    try:
        with events.open("rb") as handle:
            handle.seek(read)
            whole, _, _ = handle.read().rpartition(b"\n")
    except FileNotFoundError:
        return read
    for line in whole.splitlines():
        name, *values = json.loads(line)
        getattr(report, name)(*values)
    return read + len(whole) + bool(whole)


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


class _Events:
    """The Reporter on the node."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w", encoding="utf-8", buffering=1)

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        self._write("stage", name, total, unit)

    def advance(self, done: int) -> None:
        self._write("advance", done)

    def note(self, text: str) -> None:
        self._write("note", text)

    def _write(self, *event: object) -> None:
        self._file.write(json.dumps(event) + "\n")


def _on_node(
    values: dict[str, Any], python: str, log: str, work: str, events: str, threads: str | None
) -> dict[str, Any]:
    """Runs on a node: the result, or what failed, in a form that travels.

    `threads` is what the user set; Ray sets it to the cores that the task asked for.
    """
    job = Job.from_json(values)
    needed = [job.model, work, job.out, python, job.tokens, job.resume_folder]
    absent = [path for path in needed if path and not Path(path).exists()]
    if absent:
        return {
            "kind": "InputError",
            "message": f"The node {socket.gethostname()} does not see {absent[0]}.",
            "hint": "keep model, output and the backend's environment where all nodes see them "
            "under the same path",
            "code": "ray.not_shared",
        }
    os.environ.pop(_THREADS, None)
    if threads:
        os.environ[_THREADS] = threads
    report = _Events(Path(events))
    report.note(f"the library works on the node {socket.gethostname()}")
    try:
        result = run_worker(job, python=Path(python), log=Path(log), report=report, work=Path(work))
    except (InputError, BackendError) as error:
        kind = "InputError" if isinstance(error, InputError) else "BackendError"
        return {"kind": kind, "message": error.message, "hint": error.hint, "code": error.code}
    return {"result": asdict(result)}


def _unwrap(answer: dict[str, Any]) -> Result:
    if "result" in answer:
        return Result(**answer["result"])
    raise _ERRORS[answer["kind"]](answer["message"], hint=answer["hint"], code=answer["code"])
