"""A whole job on one node of a Ray cluster: what it asks for, what comes back, lost nodes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantkit.backends.process.job import Job, Result, Unit
from quantkit.backends.process.on_ray import cluster_room, resources, run_on_node
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import BackendError, InputError
from tests.support.cli import QUICK, inside, quantkit
from tests.support.processes import wait_until_gone

ADAPTERS = Path(__file__).parent / "adapters"
GB = 10**9


def job(tmp_path: Path, adapter: str = "good", **changes: object) -> Job:
    """A job whose folders are all there."""
    for name in ("model", "out", "layers", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    fields: dict[str, object] = {
        "task": "quantize", "backend": "modelopt", "adapter": f"worker_adapters:{adapter}",
        "method": "modelopt_fp8", "model": str(tmp_path / "model"), "out": str(tmp_path / "out"),
        "scheme": None, "resume_folder": str(tmp_path / "layers"),
    }  # fmt: skip
    return Job(**{**fields, **changes})  # type: ignore[arg-type]


NODES = [{"CPU": 2.0, "memory": 8.0 * GB}, {"CPU": 16.0, "memory": 64.0 * GB, "GPU": 2.0},
         {"CPU": 0.0, "memory": 256.0 * GB}]  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "memory", "cpus", "gpus", "given"),
    [
        (["cpu"], 6, 2, 0, 6),
        (["cpu"], 20, 16, 0, 20),
        (["cpu"], 100, 16, 0, 64),
        (["cuda"], 6, 1, 1, 6),
        (["cuda:0", "cuda:1"], 6, 1, 2, 6),
    ],
)
def test_what_the_plan_estimated_is_asked_of_a_node_that_has_it(
    devices: list[str], memory: int, cpus: int, gpus: int, given: int, tmp_path: Path
) -> None:
    """Never of one without a core, and never more than there is."""
    asked = resources(NODES, job(tmp_path, device=devices[0], devices=devices), memory * GB)
    assert asked == {"num_cpus": cpus, "num_gpus": gpus, "memory": given * GB}


@pytest.mark.parametrize(
    ("devices", "code", "telling"),
    [
        (["cuda:0", "cuda:1", "cuda:2"], "ray.no_node", "a core and 3 GPUs: the most"),
        (["npu:0"], "ray.device", "not npu:0"),
    ],
)
def test_what_no_node_has_is_refused(
    devices: list[str], code: str, telling: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=telling) as caught:
        resources(NODES, job(tmp_path, device=devices[0], devices=devices), GB)
    assert caught.value.code == code


def test_without_ray_nothing_begins(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ("quantize", small_model, "--method", "modelopt_fp8", "--out", tmp_path / "out")
    code, name, message = inside(*words, "--device", "cpu", "--executor", "ray")
    assert (code, name) == (1, "stream.no_ray"), message
    code, name, message = inside(*words, "--device", "cpu", "--jobs", "2")
    assert (code, name) == (1, "request.stream_only"), message
    assert not list(tmp_path.iterdir())


class Told:
    """A Reporter that keeps what it was told, and does something when a layer is finished."""

    def __init__(self, advanced: Callable[[int], None] = lambda _: None) -> None:
        self.events: list[tuple[object, ...]] = []
        self._advanced = advanced

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        self.events.append(("stage", name, total))

    def advance(self, done: int) -> None:
        self.events.append(("advance", done))
        self._advanced(done)

    def note(self, text: str) -> None:
        self.events.append(("note", text))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs nothing, and a node with one core and 2 GB."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before, threads = os.environ.get("PYTHONPATH", ""), os.environ.pop("OMP_NUM_THREADS", None)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ADAPTERS), before)))
    built = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    built.add_node(num_cpus=1, memory=2 * GB)
    ray.init(address=built.address, log_to_driver=False)
    yield built
    ray.shutdown()
    built.shutdown()  # type: ignore[no-untyped-call]
    os.environ["PYTHONPATH"] = before
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads


def run(made: Job, tmp_path: Path, told: Told, again: Callable[[], None] = lambda: None) -> Result:
    return run_on_node(
        made, python=Path(sys.executable), log=tmp_path / "log.txt", report=told,
        work=tmp_path / "work", memory=GB, again=again,
    )  # fmt: skip


@pytest.mark.engine
def test_log_progress_and_result_come_back(cluster: Any, tmp_path: Path) -> None:
    told = Told()
    (tmp_path / "tokens").write_text("ids")
    (tmp_path / "go").touch()
    options = {"go": str(tmp_path / "go")}
    made = job(tmp_path, "layered", options=options, tokens=str(tmp_path / "tokens"))
    result = run(made, tmp_path, told)
    assert result.ok
    assert told.events[0] == ("stage", "wait for a node of the cluster", 0)
    assert told.events[-3:] == [("advance", 1), ("advance", 2), ("advance", 3)]
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    assert seen == {"threads": None, "tokens": str(tmp_path / "work" / "tokens.safetensors")}
    again = job(tmp_path, "good")
    assert run(again, tmp_path, told).notes == ["one layer was skipped"]
    assert "a line for the log" in (tmp_path / "log.txt").read_text()
    room = cluster_room()
    assert room is not None
    assert room("host") == 2 * GB
    assert room("cuda:0") is None


@pytest.mark.engine
def test_failures_come_back_as_they_are_here(cluster: Any, tmp_path: Path) -> None:
    told = Told()
    with pytest.raises(InputError, match="Another model") as refused:
        run(job(tmp_path, "input_error"), tmp_path, told)
    assert refused.value.code == "state.other_model"
    with pytest.raises(BackendError, match="failed in stage export"):
        run(job(tmp_path, "library_error"), tmp_path, told)
    with pytest.raises(BackendError, match="was killed by SIGKILL in stage calibrate"):
        run(job(tmp_path, "killed"), tmp_path, told)
    with pytest.raises(InputError, match="does not see /nowhere") as unseen:
        run(job(tmp_path, model="/nowhere"), tmp_path, told)
    assert unseen.value.code == "ray.not_shared"


@pytest.mark.engine
def test_a_lost_worker_and_a_lost_node_cost_what_was_not_finished(
    cluster: Any, tmp_path: Path
) -> None:
    go, workers, readied = tmp_path / "go", [], []

    def strike(done: int) -> None:
        """With two layers finished: first the worker goes, then its node, then nothing."""
        if done != 2:
            return
        workers.append(int((tmp_path / "layers" / "layer-1").read_text()))
        if len(workers) == 1:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.name().startswith("ray::_on_node"):
                        process.send_signal(signal.SIGKILL)
        elif len(workers) == 2:
            first = cluster.worker_nodes.copy().pop()
            cluster.add_node(num_cpus=1, memory=2 * GB)
            cluster.remove_node(first, allow_graceful=False)
        else:
            go.touch()

    told = Told(strike)
    made = job(tmp_path, "layered", options={"go": str(go)})
    result = run(made, tmp_path, told, again=lambda: readied.append(1))
    assert result.ok
    notes = [str(event[1]) for event in told.events if event[0] == "note"]
    assert [note for note in notes if note.startswith("from layer")] == [
        "from layer 0", "from layer 2", "from layer 2"
    ]  # fmt: skip
    assert sum("goes on elsewhere" in note for note in notes) == len(readied) == 2
    wait_until_gone([workers[0]])


@pytest.mark.engine
def test_an_interrupted_command_leaves_no_worker_on_the_node(cluster: Any, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            job(tmp_path, "layered", options={"go": str(tmp_path / "never")}),
            tmp_path,
            Told(interrupt),
        )
    wait_until_gone([int((tmp_path / "layers" / "layer-1").read_text())])


@pytest.mark.engine
@pytest.mark.library
def test_a_calibrating_job_on_ray_gives_the_same_bytes(small_model: Path, tmp_path: Path) -> None:
    """On a cluster of this machine that the command starts and ends."""
    pytest.importorskip("ray")
    digests = []
    for name, more in (("here", ()), ("ray", ("--executor", "ray"))):
        out = tmp_path / name
        done = quantkit("quantize", small_model, "--method", "modelopt_fp8", "--out", out,
                        "--device", "cpu", *QUICK, *more)  # fmt: skip
        assert done.code == 0, done.err
        digests.append(open_checkpoint(out).digests())
    assert digests[0] == digests[1]
    assert {path.name for path in tmp_path.iterdir()} == {"here", "ray"}
