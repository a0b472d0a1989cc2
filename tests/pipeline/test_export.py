"""`quantkit export --restore`: our states, states made elsewhere, and states that do not fit."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.directory import open_checkpoint
from tests.support.cli import quantkit, refused
from tests.support.helpers import copy_checkpoint, edit_tensors

pytestmark = pytest.mark.library

Outputs = dict[str, tuple[Path, Path]]


def without_note(state: Path, target: Path) -> Path:
    """The same state as plain `mto.save` writes it: every record but quantkit's."""
    with zipfile.ZipFile(state) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            if not record.filename.endswith("/quantkit.json"):
                new.writestr(record, old.read(record))
    return target


def changed_base(model: Path, target: Path) -> Path:
    """The base model with one weight changed."""
    base = copy_checkpoint(model, target)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1

    edit_tensors(base, change)
    return base


@pytest.mark.parametrize("method", ["modelopt_fp8", "modelopt_int4_awq"])
def test_export_equals_direct_export(outputs: Outputs, method: str, tmp_path: Path) -> None:
    out, state = outputs[method]
    run = quantkit("export", "--restore", state, "--out", tmp_path / "again", "--json")
    assert run.code == 0, run.err
    assert open_checkpoint(out).digests() == open_checkpoint(tmp_path / "again").digests()
    first, second = (
        json.loads((place / "quantkit.json").read_text()) for place in (out, tmp_path / "again")
    )
    for note in (first, second):
        note["files"].pop("quantkit.log")
    for key in ("recipe", "source", "plan", "files", "results"):
        assert first[key] == second[key], key
    assert second["calibration"]["digest"] == first["calibration"]["digest"]


def test_a_state_made_elsewhere_needs_its_base_model(
    outputs: Outputs, small_model: Path, tmp_path: Path
) -> None:
    out, state = outputs["modelopt_fp8"]
    plain = without_note(state, tmp_path / "plain.pth")
    refused(quantkit("export", "--restore", plain, "--out", tmp_path / "out"), 1, "--model BASE")
    run = quantkit("export", "--restore", plain, "--out", tmp_path / "out", "--model", small_model)
    assert run.code == 0, run.err
    assert open_checkpoint(out).digests() == open_checkpoint(tmp_path / "out").digests()
    note = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert note["calibration"] == {"name": "unknown", "digest": None}
    assert note["method"] == "modelopt_fp8"
    assert "Calibration unknown" in (tmp_path / "out" / "README.md").read_text()
    assert quantkit("verify", tmp_path / "out").code == 0


def test_another_base_model_is_refused_with_what_differs(
    outputs: Outputs, small_model: Path, tmp_path: Path
) -> None:
    _, state = outputs["modelopt_fp8"]
    base = changed_base(small_model, tmp_path / "base")
    run = quantkit("export", "--restore", state, "--out", tmp_path / "out", "--model", base)
    refused(run, 1, "fingerprint", str(base))
    assert not (tmp_path / "out").exists()


def test_another_library_version_is_refused(outputs: Outputs, tmp_path: Path) -> None:
    _, state = outputs["modelopt_fp8"]
    older = tmp_path / "older.pth"
    with zipfile.ZipFile(state) as old, zipfile.ZipFile(older, "w") as new:
        for record in old.infolist():
            data = old.read(record)
            if record.filename.endswith("/quantkit.json"):
                note = json.loads(data)
                note["versions"]["nvidia-modelopt"] = "0.31.0"
                data = json.dumps(note).encode()
            new.writestr(record, data)
    run = quantkit("export", "--restore", older, "--out", tmp_path / "out")
    refused(run, 1, "0.31.0", "nvidia-modelopt")
    assert not (tmp_path / "out").exists()


def test_a_truncated_state_is_refused(outputs: Outputs, tmp_path: Path) -> None:
    _, state = outputs["modelopt_fp8"]
    short = tmp_path / "short.pth"
    short.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    refused(quantkit("export", "--restore", short, "--out", tmp_path / "out"), 1, "cut short")
