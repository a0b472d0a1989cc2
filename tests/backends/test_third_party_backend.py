"""The example of a backend in a package of its own, installed and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import command

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party_backend"
RECIPE = EXAMPLE / "truncate_w8a16.yaml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the example is installed."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, work / "source")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", work / "site", work / "source"],
        check=True,
    )  # fmt: skip
    return {**os.environ, "PYTHONPATH": str(work / "site")}


def run(environment: dict[str, str], *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), env=environment, capture_output=True, text=True, check=False
    )


def test_it_makes_a_checkpoint_that_verifies(
    installed: dict[str, str], small_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(
        installed, "quantize", small_model, "--recipe", RECIPE, "--out", out, "--json",
        "--set", "options.clip=0.9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    note = json.loads((out / "quantkit.json").read_text())
    assert note["versions"]["quantkit-truncate"] == "0.1.0"
    assert note["recipe"]["options"] == {"clip": 0.9}
    assert any("weights clipped" in text for text in note["notes"])
    assert note["results"]["weight_sqnr_db"]["min"] > 16


def test_its_refusals_and_options_are_checked_in_the_plan(
    installed: dict[str, str], small_model: Path
) -> None:
    refused = run(installed, "plan", small_model, "--recipe", RECIPE, "--set", "symmetric=false")
    assert refused.returncode == 1
    assert "truncate writes symmetric weights only" in refused.stderr
    unknown = run(installed, "plan", small_model, "--recipe", RECIPE, "--set", "options.clop=1")
    assert unknown.returncode == 1
    assert "Did you mean clip" in unknown.stderr


def test_without_the_package_there_is_no_such_backend(small_model: Path) -> None:
    done = run(dict(os.environ), "plan", small_model, "--recipe", RECIPE)
    assert done.returncode == 1
    assert "no backend 'truncate'" in done.stderr
