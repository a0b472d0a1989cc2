"""The cells as tasks of a Ray cluster, which schedules them by what the plan says they need.

Model and output lie on a file system that all nodes see under the same path. A worker or a node
that dies costs the cells that it ran; Ray starts those again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.backends.environments.device import resolve_devices
from quantkit.backends.registry import load_recipe
from quantkit.backends.streaming.ray_executor import RETRIES, WAIT, cluster, gpus_a_task
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.pipeline.placement import place
from quantkit.pipeline.plan import make_plan
from quantkit.validation.sweep.cell import CellJob, run_cell
from quantkit.validation.sweep.file import AUTO


def run_on_ray(
    cells: Sequence[tuple[int, CellJob]], device: str, done: Callable[[int, dict[str, Any]], None]
) -> None:
    """Run every cell on the cluster that RAY_ADDRESS names; `done` gets the number and the record
    of each that ended. Raises InputError when ray is not installed."""
    with cluster() as (ray, nodes):
        gpus = gpus_a_task(nodes, device)
        most = max((node.get("memory", 0.0) for node in nodes), default=0.0)
        running = {}
        for number, job in cells:
            asked = {"num_cpus": 1, "num_gpus": gpus, "memory": min(memory_of(job), most)}
            remote = ray.remote(**asked, max_retries=RETRIES)(run_cell)
            running[remote.remote(job)] = number
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=WAIT)
            for reference in ready:
                done(running.pop(reference), _get(ray, reference))


def memory_of(job: CellJob) -> float:
    """Bytes of host memory that a cell takes: the weights in 16 bit and a third to validate it, or
    what the plan estimates to quantize it. A plan that is refused asks nothing: its cell will say
    why."""
    model = open_checkpoint(Path(job.model))
    needed = model.weight_bytes * 4 / 3
    if job.method != AUTO:
        with suppress(QuantkitError):
            plan = make_plan(model, load_recipe(job.method, tuple(job.sets)), device=job.device)
            if plan.backend.way == "process":
                placed = place(model, plan.recipe, plan.backend, resolve_devices(job.device))
                needed = max(needed, placed.need.host)
    return needed


def _get(ray: Any, reference: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        message = f"its workers were lost: {lines[-1] if lines else error!r}"
        return {"status": "failed", "error": {"code": "sweep.worker_lost", "message": message,
                "hint": "look at the cluster with `ray status`, then --resume"}}  # fmt: skip
    return found
