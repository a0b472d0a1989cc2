"""Run shard tasks on a Ray cluster: one remote task a shard, retried where a worker is lost.

Source and output lie on a file system that all nodes see under the same path. A worker that dies
costs its shard only; Ray starts that one again elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.backends.streaming.crew import hands
from quantkit.backends.streaming.execute import Finished, run_tasks
from quantkit.backends.streaming.job import ShardRecord, ShardTask, StreamOptions
from quantkit.checkpoint.progress import BytesDone
from quantkit.errors import BackendError, InputError

RETRIES = 3
WAIT = 0.5


def run_on_ray(
    tasks: Sequence[ShardTask],
    out: Path,
    options: StreamOptions,
    jobs: int,
    device: str,
    progress: BytesDone,
    finished: Finished,
) -> None:
    """As `execute.run_tasks`, with `jobs` workers a shard (at most the cores of a node).

    Joins the cluster that RAY_ADDRESS names, or starts one on this machine. Raises InputError when
    ray is not installed, and BackendError when a shard's workers were lost RETRIES times over.
    """
    with cluster() as (ray, nodes):
        workers = max(1, min(jobs, max(int(node.get("CPU", 0)) for node in nodes)))
        gpus = gpus_a_task(nodes, device)
        remote = ray.remote(num_cpus=workers, num_gpus=gpus, max_retries=RETRIES)(_quantize_shard)
        running = {
            remote.remote(task, out.resolve(), options, workers, device): task for task in tasks
        }
        done = 0
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=WAIT)
            for reference in ready:
                task = running.pop(reference)
                finished(_unwrap(_get(ray, reference, task)))
                done += task.read_bytes
            progress(done)


@contextmanager
def cluster() -> Iterator[tuple[Any, list[dict[str, float]]]]:
    """The package ray, and the resources of each node of the cluster that RAY_ADDRESS names or
    that is started on this machine; left again where it was joined here.

    Raises InputError when ray is not installed.
    """
    ray = import_ray()
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
    try:
        yield ray, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if started_here:
            ray.shutdown()


def gpus_a_task(nodes: Sequence[Mapping[str, float]], device: str) -> int:
    """How many GPUs a task on that device asks for."""
    return int(device != "cpu" and any(node.get("GPU") for node in nodes))


def _quantize_shard(
    task: ShardTask, out: Path, options: StreamOptions, jobs: int, device: str
) -> ShardRecord | dict[str, Any]:
    """Runs on a node: the record, or what failed in a form that travels."""
    records: list[ShardRecord] = []
    try:
        with hands(jobs, device, options) as crew:
            crew.start()
            run_tasks(crew, [task], out, {}, lambda _: None, records.append)
    except InputError as error:
        return {"message": error.message, "hint": error.hint, "code": error.code}
    except OSError as error:
        return {"errno": error.errno, "message": str(error)}
    return records[0]


def _get(ray: Any, reference: Any, task: ShardTask) -> ShardRecord | dict[str, Any]:
    try:
        result: ShardRecord | dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        raise BackendError(
            f"The workers for {task.file} were lost or failed: {lines[-1] if lines else error!r}",
            hint="look at the cluster with `ray status`, then run again with --resume",
            code="stream.worker_lost",
        ) from error
    return result


def _unwrap(result: ShardRecord | dict[str, Any]) -> ShardRecord:
    if isinstance(result, ShardRecord):
        return result
    if "errno" in result:
        raise OSError(result["errno"], result["message"])
    raise InputError(result["message"], hint=result["hint"], code=result["code"])


def import_ray() -> Any:
    """The package ray; InputError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--executor ray needs the package ray, which is not installed.",
            hint="pip install 'quantkit[ray]'",
            code="stream.no_ray",
        ) from error
    return ray
