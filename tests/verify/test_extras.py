"""Warnings that are no errors: tokenizer files beyond the source's, and unusual scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.verification import verify
from tests.support.damage import L1, patch
from tests.support.rtn import rtn

EXTRAS: dict[str, dict[str, Any]] = {
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "added_tokens.json": {"<nowhere>": 7},
    "special_tokens_map.json": {"eos_token": "<nowhere>"},
}


@pytest.fixture(scope="module")
def fp8(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(small_model, tmp_path_factory.mktemp("extras") / "fp8", SCHEMES["fp8_dynamic"])


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_tokenizer_file_that_contradicts(
    fp8: Path, small_model: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(fp8, copy)
    (copy / name).write_text(json.dumps(EXTRAS[name]))
    report = verify(copy, small_model)
    assert report.ok, report.errors
    found = [f for f in report.findings if f.code == "sidecar.contradicts"]
    assert [f.where for f in found] == [name]


def test_an_input_scale_unlike_its_kind(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact("modelopt/fp8_kv"), copy)
    before = {f.code for f in verify(copy).findings}
    assert "input_scale.unusual" not in before
    patch(copy, f"{L1}mlp.down_proj.input_scale", lambda t: t * 1e5)
    report = verify(copy)
    assert report.ok, report.errors
    assert "input_scale.unusual" in {f.code for f in report.findings}
