"""What a new user sees first: how the environment is made, progress, and a plan that says why."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from quantkit.cli.output import Output
from quantkit.recipe.units import duration
from tests.support.cli import quantkit
from tests.support.families import model

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "WARNING: cache entry failed"\\n%s\\n' "$PIP" > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""
"""An interpreter whose `-m venv DIR` makes nothing but a pip that warns and runs $PIP."""


def make_env(tmp_path: Path, pip: str) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return subprocess.run(
        ["make", "--no-print-directory", "env", f"VENV={tmp_path / 'env'}", f"PYTHON={python}"],
        cwd=ROOT, env={**os.environ, "PIP": pip, "MAKEFLAGS": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_an_environment_is_announced_and_pip_is_quiet(tmp_path: Path) -> None:
    done = make_env(tmp_path, "exit 0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "torch" in done.stdout
    assert "2 to 5 minutes" in done.stdout
    assert done.stderr == ""


def test_what_pip_said_is_shown_when_it_fails(tmp_path: Path) -> None:
    done = make_env(tmp_path, "echo no matching distribution; exit 1")
    assert done.returncode != 0
    assert "no matching distribution" in done.stderr
    assert not (tmp_path / "env" / ".ready").exists()


def line(done: int, total: int, seconds: float, unit: str) -> str:
    ui = Output()
    ui._total, ui._unit = total, unit  # type: ignore[assignment]
    return ui._progress_line(done, seconds)


@pytest.mark.parametrize("unit", ["steps", "bytes"])
@pytest.mark.parametrize("done", [0, 1, 39_000_000])
def test_nothing_is_estimated_before_there_is_something_to_go_by(done: int, unit: str) -> None:
    said = line(done, 4_000_000_000, 60.0, unit)
    assert "left" not in said
    assert "/s" not in said


def test_an_estimate_follows_what_is_done() -> None:
    assert line(1_000_000_000, 4_000_000_000, 20.0, "bytes") == (
        "1000/4000 MB, 50 MB/s, about 60 s left"
    )
    assert line(2, 32, 60.0, "steps") == "2/32, about 15 min left"
    assert line(1, 2, 1.0, "steps") == "1/2, about 1 s left"


def test_times_are_said_as_people_say_them() -> None:
    assert [duration(s) for s in (0.4, 40, 99, 100, 3600, 9000)] == [
        "0 s", "40 s", "99 s", "2 min", "60 min", "2.5 h",
    ]  # fmt: skip


def test_a_plan_has_no_empty_cell(tmp_path: Path) -> None:
    run = quantkit("plan", model("llama", tmp_path / "model"), "--method", "rtn_fp8_dynamic")
    assert run.code == 0, run.err
    rows = [[cell.strip() for cell in row.split("│")[1:3]] for row in run.out.splitlines()
            if row.startswith("│")]  # fmt: skip
    assert {"vLLM loads it", "SGLang loads it"} <= {label for label, _ in rows}
    assert all(text for _, text in rows), rows


def test_the_demo_quantizes_a_mixture_of_experts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = quantkit("demo", "--moe", "--method", "rtn_fp8_dynamic", "--out", out, "--json")
    assert run.code == 0, run.err
    assert run.document["verify"]["ok"]
    assert any(".experts.3." in layer["module"] for layer in run.document["verify"]["layers"])
