"""Shards as tasks of a Ray cluster: two simulated nodes, one of which is lost on the way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantkit.errors import InputError
from tests.streaming.test_run import spoil
from tests.support.helpers import copy_checkpoint
from tests.support.streaming import sharded, stream

pytestmark = pytest.mark.engine

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    built = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    built.add_node(num_cpus=1)
    ray.init(address=built.address, log_to_driver=False)
    yield built
    ray.shutdown()
    built.shutdown()  # type: ignore[no-untyped-call]


def test_two_nodes_give_the_same_bytes(cluster: Any, small_model: Path, tmp_path: Path) -> None:
    model = sharded(small_model, tmp_path / "model", 5)
    local = stream(model, tmp_path / "local", "nvfp4a16")
    seen: list[tuple[int, int]] = []
    result = stream(
        model, tmp_path / "ray", "nvfp4a16", executor="ray", jobs=1,
        on_progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert result.digests == local.digests
    assert result.source_digests == local.source_digests
    assert result.relative_error == local.relative_error
    assert seen[-1][0] == seen[-1][1]
    assert not list((tmp_path / "ray").glob("*.writing"))


def test_a_lost_worker_and_a_lost_node_cost_their_shards_only(
    cluster: Any, small_model: Path, tmp_path: Path
) -> None:
    model = sharded(small_model, tmp_path / "model", 6)
    local = stream(model, tmp_path / "local", "w4a16:32")
    out, extra = tmp_path / "ray", cluster.add_node(num_cpus=1)
    killed: list[int] = []

    def strike(_done: int, _total: int) -> None:
        """Kill the first worker that is seen writing, then the node that was added."""
        for process in [] if killed else psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if not killed and process.name().startswith("ray::_quantize"):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
        if killed and extra in cluster.list_all_nodes():
            cluster.remove_node(extra, allow_graceful=False)

    result = stream(
        model, out, "w4a16:32", executor="ray", jobs=1, on_progress=strike
    )  # fmt: skip
    assert killed
    assert result.digests == local.digests
    assert not list(out.glob("*.writing"))


def test_a_refusal_travels_back(cluster: Any, small_model: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    name = "model.layers.2.mlp.up_proj.weight"
    spoil(model, name)
    with pytest.raises(InputError, match="2 NaN or infinite values") as caught:
        stream(model, tmp_path / "out", "fp8_dynamic", executor="ray", jobs=1)
    assert name in caught.value.message
    assert caught.value.code == "source.nonfinite"
