"""Layers whose Hessian cannot be inverted, for real: what the library did instead is told and kept.

The norm before the last MLP gives its input values of 1e20 (of which nothing comes out after the
last norm), so that the sums of squares there overflow float32; the first layers' `down_proj` has
more inputs than there are calibration tokens, so that its Hessian is singular without damping.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.cli import QUICK, Run, quantkit
from tests.support.helpers import copy_checkpoint, edit_tensors

pytestmark = pytest.mark.library

NORM = "model.layers.2.post_attention_layernorm.weight"
DOWN = tuple(f"model.layers.{index}.mlp.down_proj" for index in range(3))


@pytest.fixture(scope="module")
def overflowing(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] *= 2.0**66

    model = copy_checkpoint(small_model, tmp_path_factory.mktemp("models") / "overflowing")
    edit_tensors(model, scale)
    return model


def down_projections(model: Path, method: str, out: Path, *more: str) -> tuple[Run, list[str]]:
    run = quantkit(
        "quantize", model, "--method", method, "--out", out, *QUICK,
        "--set", "targets=['*.down_proj']", *more,
    )  # fmt: skip
    assert run.code == 0, run.err
    notes: list[str] = json.loads((out / "quantkit.json").read_text())["notes"]
    return run, notes


def test_gptqmodel_rounds_to_nearest_and_says_where_and_how_it_damped(
    overflowing: Path, tmp_path: Path
) -> None:
    run, notes = down_projections(
        overflowing, "gptqmodel_w4a16", tmp_path / "out", "--set", "options.damp_percent=1e-9"
    )
    expected = [
        "layer 0 mlp.down_proj: damping raised from 1e-09 to 0.01 to invert the Hessian",
        "layer 1 mlp.down_proj: damping raised from 1e-09 to 0.01 to invert the Hessian",
        "layer 2 mlp.down_proj: rounded to nearest instead of GPTQ (rtn fallback)",
    ]
    assert [text for text in notes if "down_proj" in text] == expected
    assert all(text in run.err for text in expected)


def test_llmcompressor_rounds_to_nearest_and_says_where(overflowing: Path, tmp_path: Path) -> None:
    run, notes = down_projections(overflowing, "llmcompressor_w4a16", tmp_path / "out")
    told = f"{DOWN[2]}: rounded to nearest, its Hessian could not be inverted"
    assert told in notes
    assert told in run.err
    assert not any(text.startswith(DOWN[:2]) for text in notes)
