"""A sweep as a user runs it, here and on Ray: a failed cell stops nothing, what is done stays, and
kills cost time alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
import yaml

from tests.support.cli import command, inside, quantkit, refused
from tests.support.tiny import byte_llama

pytestmark = pytest.mark.engine

SETTLED = ["canary_failures<=8", "canary_drift<=100"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_llama(tmp_path_factory.mktemp("model") / "llama")


def write(folder: Path, model: Path, recipes: list[Any], **validate: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "sweep.yaml"
    asked = {"samples": 1, "throughput": False, "gates": SETTLED, **validate}
    asked["broken_baseline"] = True  # random weights
    file.write_text(yaml.safe_dump({"models": [str(model)], "recipes": recipes, "validate": asked}))
    return file


def table(out: Path) -> list[dict[str, Any]]:
    """The leaderboard without what a second run may change."""
    document = json.loads((out / "leaderboard.json").read_text())
    measured = ("model", "recipe", "digest", "status", "bytes", "bits_per_weight", "kl",
                "perplexity_ratio", "top1_agreement", "facts_lost", "error")  # fmt: skip
    return [{key: cell[key] for key in measured} for cell in document["cells"]]


GOOD, BROKEN = "rtn_w8a16", {"method": "rtn_w4a16", "set": {"ignore+": ["@linear"]}}


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished sweep of a cell that fails and one that does not: its file and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    file, out = write(folder, llama, [BROKEN, GOOD]), folder / "out"
    run = quantkit("sweep", file, "--out", out)
    assert run.code == 3, run.err
    return file, out


def test_a_failed_cell_stops_nothing(whole: tuple[Path, Path]) -> None:
    file, out = whole
    by_recipe = {cell["recipe"].split()[0]: cell for cell in table(out)}
    assert by_recipe["rtn_w4a16"]["status"] == "failed"
    assert "no module is left" in by_recipe["rtn_w4a16"]["error"]
    good = by_recipe["rtn_w8a16"]
    assert good["status"] in ("ok", "gate failed")
    assert good["kl"] > 0
    folder = out / "cells" / good["digest"]
    assert (folder / "report.html").is_file()
    assert (folder / "checkpoint" / "quantkit.json").is_file()
    refused(quantkit("sweep", file, "--out", out), 1, "holds a sweep", "--resume")


def test_a_wider_sweep_runs_only_the_new_cells(
    whole: tuple[Path, Path], llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/report.json")}
    wider = write(tmp_path / "wider", llama, [GOOD, {"method": GOOD, "set": {"seed": 7}}])
    earlier = whole[1] / "leaderboard.json"
    run = quantkit("sweep", wider, "--out", out, "--resume", "--against", earlier, "--json")
    assert run.code in (0, 4), run.err
    assert run.document["worse"] == []
    assert len(run.document["cells"]) == 2
    assert any("is new" in note for note in run.document["notes"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len({cell["kl"] for cell in run.document["cells"]}) == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_output_that_holds_something_else_is_left(
    what: str, llama: Path, tmp_path: Path
) -> None:
    file, out = write(tmp_path / "asked", llama, [GOOD]), tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    code, name, _ = inside("sweep", file, "--out", out)
    assert code == 1
    assert name in ("output.exists", "output.not_writable")
    assert (out if what == "file" else out / "mine").read_text() == "mine"


def strike(whole: tuple[Path, Path], out: Path, kills: int, span: float) -> None:
    """Run the sweep and kill it, or one of its workers, at random moments within so many seconds,
    until so many kills hit something that ran. A sweep that ends before is seen to be the same, and
    begun anew."""
    file, wanted = whole
    dice, hits = random.Random(kills), 0
    while hits < kills:
        words = command("sweep", file, "--out", out, "--resume")
        with subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as running:
            with suppress(subprocess.TimeoutExpired):
                running.wait(dice.uniform(0.5, span))
            if running.returncode is not None:
                assert running.returncode == 3
                assert table(out) == table(wanted)
                shutil.rmtree(out)
                continue
            driver = psutil.Process(running.pid)
            with suppress(psutil.Error):
                family = [driver, *driver.children(recursive=True)]
                dice.choice(family).send_signal(signal.SIGKILL)
                hits += 1
            if dice.random() < 0.5:
                running.terminate()
            running.wait(120)


def test_two_kills_change_nothing_in_the_table(whole: tuple[Path, Path], tmp_path: Path) -> None:
    survive(whole, tmp_path / "struck", 2, 6)


@pytest.mark.slow
def test_twenty_kills_change_nothing_in_the_table(llama: Path, tmp_path: Path) -> None:
    recipes = [GOOD, BROKEN, "rtn_fp8_dynamic", {"method": "rtn_w4a16", "set": {"group_size": 32}}]
    file, out = write(tmp_path, llama, recipes), tmp_path / "whole"
    assert quantkit("sweep", file, "--out", out).code == 3
    survive((file, out), tmp_path / "struck", 20, 12)


def survive(whole: tuple[Path, Path], struck: Path, kills: int, span: float) -> None:
    file, out = whole
    strike(whole, struck, kills, span)
    assert quantkit("sweep", file, "--out", struck, "--resume").code == 3
    assert table(struck) == table(out)
    assert not list(struck.glob("cells/*/*.partial"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster of two nodes."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    built = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    built.add_node(num_cpus=1)
    yield built.address
    built.shutdown()  # type: ignore[no-untyped-call]


def test_two_nodes_give_the_same_table_though_a_worker_is_lost(
    whole: tuple[Path, Path], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = whole
    monkeypatch.setenv("RAY_ADDRESS", address)
    killed: list[int] = []
    over = Event()

    def kill_one() -> None:
        """Kill the first worker that is seen running a cell."""
        while not killed and not over.wait(0.2):
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.name().startswith("ray::run_cell") and not killed:
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)

    watch = Thread(target=kill_one)
    watch.start()
    run = quantkit("sweep", file, "--out", tmp_path / "ray")
    over.set()
    watch.join()
    assert run.code == 3, run.err
    assert killed
    assert table(tmp_path / "ray") == table(out)
