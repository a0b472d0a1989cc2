"""`quantkit calibration`: data on stdout, the rest on stderr, one JSON document with --json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from quantkit.cli.app import app
from quantkit.errors import InputError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["calibration", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_list() -> None:
    assert "default" in run("list")
    listed = json.loads(run("list", "--json"))["calibrations"]
    assert {"default", "c4"} <= {entry["name"] for entry in listed}


def test_show_prints_yaml_that_can_be_read_back(tmp_path: Path, small_model: Path) -> None:
    shown = run("show", "default", "--set", "samples=5", "--set", "sequence_length=32")
    assert yaml.safe_load(shown)["samples"] == 5
    (tmp_path / "again.yaml").write_text(shown)
    again = json.loads(
        run("build", str(tmp_path / "again.yaml"), "--model", str(small_model), "--json")
    )
    assert (again["samples"], again["length"]) == (5, 32)
    assert json.loads(run("show", again["path"], "--json")) == again
    assert again["digest"] in run("show", again["path"])


def test_refusals(tmp_path: Path) -> None:
    for arguments, code in (
        (["show", "default", "--set", "samples"], "calibration.bad_set"),
        (["show", str(tmp_path / "none.safetensors")], "calibration.bad_token_file"),
        (["build", "default", "--model", str(tmp_path)], "calibration.no_tokenizer"),
    ):
        with pytest.raises(InputError) as caught:
            run(*arguments)
        assert caught.value.code == code
