"""Pictures in a calibration: drawn from a seed, prepared by the model's processor, kept by row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from quantkit.backends.adapters.seen_tokens import Tokens
from quantkit.backends.process.job import Job
from quantkit.calibration import build_tokens
from quantkit.calibration.config import CalibrationConfig
from quantkit.calibration.pictures import SIDE, draw
from quantkit.checkpoint.wrap_vision import TOKENS, wrap_vision
from quantkit.errors import InputError

LENGTH, SAMPLES = 128, 6


@pytest.fixture(scope="module")
def wrapped(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrap_vision(small_model, tmp_path_factory.mktemp("pictures") / "wrapped")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))


def mixture(length: int = LENGTH) -> CalibrationConfig:
    return CalibrationConfig.model_validate(
        {
            "name": "mixed", "samples": SAMPLES, "sequence_length": length,
            "sources": [{"type": "pictures"}, {"type": "stdlib", "part": "topics"}],
        }
    )  # fmt: skip


def test_a_picture_is_that_of_its_number_and_its_answer_says_what_is_in_it() -> None:
    one, again, other = draw(0, 1), draw(0, 1), draw(0, 2)
    assert one.pixels.shape == (SIDE, SIDE, 3)
    assert np.array_equal(one.pixels, again.pixels)
    assert one.answer == again.answer
    assert not np.array_equal(one.pixels, other.pixels)
    answers = [draw(0, number).answer for number in range(30)]
    assert len(set(answers)) > 25
    for kind in ("I see", "The number", ": "):
        assert any(kind in answer for answer in answers)
    assert all((draw(0, number).pixels != 255).mean() > 0.005 for number in range(9))


@pytest.mark.usefixtures("cache")
def test_pictures_and_texts_are_samples_of_one_token_file(wrapped: Path) -> None:
    made = build_tokens(mixture(), wrapped)
    assert made.samples == SAMPLES
    tensors = load_file(made.path)
    digests = made.summary["pictures"]
    rows = {name.split(".")[1] for name in digests}
    assert len(rows) == SAMPLES // 2
    assert {name.split(".")[2] for name in digests} >= {"pixel_values"}
    assert digests.keys() == tensors.keys() - {"input_ids", "attention_mask"}
    assert "<image>" in made.summary["sources"][0]["preview"]

    tokens = Tokens(Job("quantize", "b", "a", "m", "", "", None, tokens=str(made.path)))
    batches = tokens.batches(4)
    shown = [batch for batch in batches if "pixel_values" in batch]
    assert len(shown) == len(rows)
    assert all(len(batch["input_ids"]) == 1 for batch in shown)
    assert all(bool(batch["attention_mask"].all()) for batch in shown)
    assert sum(len(batch["input_ids"]) for batch in batches) == SAMPLES
    image = next(int(i) for i in shown[0]["input_ids"][0] if i == 14)
    assert all(int((batch["input_ids"] == image).sum()) == TOKENS for batch in shown)
    assert build_tokens(mixture(), wrapped).digest == made.digest


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_shown_is_told(wrapped: Path, small_model: Path) -> None:
    with pytest.raises(InputError, match="processor") as caught:
        build_tokens(mixture(), small_model)
    assert caught.value.code == "calibration.no_processor"
    with pytest.raises(InputError, match="with its picture has") as caught:
        build_tokens(mixture(16), wrapped)
    assert caught.value.code == "calibration.picture_too_long"


@pytest.mark.usefixtures("cache")
def test_pictures_of_rows_come_before_the_first_words(wrapped: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(draw(7, number).pixels).save(tmp_path / f"{number}.png")
    rows = [
        {"image": f"{number}.png", "question": f"What is number {number}?", "answer": "A picture."}
        for number in range(3)
    ]
    rows.append({"image": "https://somewhere/else.png", "question": "And this?", "answer": "No."})
    rows.append({"image": "absent.png", "question": "And that?", "answer": "No."})
    data = tmp_path / "seen.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "type": "file", "path": str(data), "turn_fields": ["question", "answer"],
        "image_field": "image",
    }  # fmt: skip
    config = CalibrationConfig.model_validate(
        {"name": "own", "samples": 3, "sequence_length": LENGTH, "sources": [source],
         "short": "pad"}
    )  # fmt: skip
    made = build_tokens(config, wrapped)
    told = made.summary["sources"][0]
    assert told["documents_used"] == 3
    assert "<global-img><image>" in told["preview"]
    assert "What is number" in told["preview"].partition("<image>")[2]
    assert len({name.split(".")[1] for name in made.summary["pictures"]}) == 3
    Image.fromarray(draw(8, 0).pixels).save(tmp_path / "0.png")
    again = build_tokens(config, wrapped)
    assert again.digest == made.digest
    assert again.summary["pictures"] != made.summary["pictures"]
