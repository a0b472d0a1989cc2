"""What calibration says of its text is told before the long job, and kept in quantkit.json."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from quantkit.backends.process.job import NO_DATA, Result
from quantkit.cli.output import Output
from quantkit.pipeline import process
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.request import Request, chosen_recipe


@pytest.mark.parametrize("identifiers", [True, False])
def test_identifiers_are_told_and_kept(
    identifiers: bool,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = [f"Sentence {i} speaks of rivers, stones and of the quiet harbour." for i in range(40)]
    if identifiers:
        texts[::2] = [str(uuid.UUID(int=(i * 2654435761 + 5) << 64)) for i in range(20)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    kept: list[str] = []

    def worker(_: Any, folder: Path, *__: Any, **___: Any) -> Result:
        assert ("identifiers" in capsys.readouterr().err) == identifiers
        shutil.copytree(small_model, folder, dirs_exist_ok=True)
        return Result(calibration=dict(NO_DATA))

    def end(*arguments: Any, trust_remote_code: bool) -> None:
        kept.extend(next(a for a in arguments if isinstance(a, Result)).notes)

    monkeypatch.setattr(process, "run_logged", worker)
    monkeypatch.setattr(process, "finish", end)
    sizes = ["calibration.samples=8", "calibration.sequence_length=64"]
    recipe = chosen_recipe("modelopt_fp8", "", str(file), sizes)
    quantize(Request(str(small_model), recipe, tmp_path / "out"), Output())
    assert any("hold identifiers" in note for note in kept) == identifiers
