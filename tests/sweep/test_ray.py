"""A sweep on a Ray cluster of two nodes: the same table as here, whatever workers are lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
import yaml

from tests.support.cli import quantkit
from tests.support.tiny import byte_llama

pytestmark = pytest.mark.engine

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    built = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    built.add_node(num_cpus=1)
    yield built.address
    built.shutdown()  # type: ignore[no-untyped-call]


def write(folder: Path, model: Path, recipes: list[Any]) -> Path:
    file = folder / "sweep.yaml"
    validate = {"samples": 1, "throughput": False, "broken_baseline": True}
    file.write_text(
        yaml.safe_dump({"models": [str(model)], "recipes": recipes, "validate": validate})
    )
    return file


def table(out: Path) -> list[tuple[Any, ...]]:
    document = json.loads((out / "leaderboard.json").read_text())
    names = ("recipe", "digest", "status", "bytes", "kl", "error")
    return [tuple(cell[name] for name in names) for cell in document["cells"]]


def test_two_nodes_give_the_same_table_though_a_worker_is_lost(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = byte_llama(tmp_path / "llama")
    broken = {"method": "rtn_w4a16", "set": {"ignore+": ["@linear"]}}
    file = write(tmp_path, model, ["rtn_w8a16", broken, "rtn_fp8_dynamic"])
    assert quantkit("sweep", file, "--out", tmp_path / "here").code == 3
    monkeypatch.setenv("RAY_ADDRESS", address)
    killed: list[int] = []
    over = Event()

    def strike() -> None:
        """Kill the first worker that is seen running a cell."""
        while not killed and not over.wait(0.2):
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.name().startswith("ray::run_cell") and not killed:
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)

    watch = Thread(target=strike)
    watch.start()
    run = quantkit("sweep", file, "--out", tmp_path / "ray")
    over.set()
    watch.join()
    assert run.code == 3, run.err
    assert killed
    assert table(tmp_path / "ray") == table(tmp_path / "here")
