"""A Llama behind a vision tower answers text as it did, and looks at pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Idefics3Processor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.wrap_vision import IMAGE, TOKENS, wrap_vision
from quantkit.errors import InputError
from tests.support.families import model

IDS = torch.arange(100, 164).unsqueeze(0)


@pytest.fixture(scope="module")
def wrapped(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrap_vision(small_model, tmp_path_factory.mktemp("vision") / "wrapped")


def read(path: Path, kind: Any = AutoModelForImageTextToText) -> Any:
    return kind.from_pretrained(path, dtype=torch.bfloat16)


def test_text_gets_the_same_logits(small_model: Path, wrapped: Path) -> None:
    with torch.inference_mode():
        plain = read(small_model, AutoModelForCausalLM)(IDS).logits
        behind = read(wrapped)(IDS).logits
    assert behind.equal(plain)


def test_a_picture_changes_the_answer(wrapped: Path) -> None:
    # Transformers 5.17 takes this class for one that needs torchvision, by a word in its file.
    pictures: Any = Idefics3ImageProcessorPil.from_pretrained(wrapped)
    tokenizer: Any = AutoTokenizer.from_pretrained(wrapped)
    template = (wrapped / "chat_template.jinja").read_text()
    processor: Any = Idefics3Processor(pictures, tokenizer, TOKENS, chat_template=template)
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    said = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    assert said.count(IMAGE) == 1
    plain = processor.apply_chat_template([{"role": "user", "content": "What is this?"}])
    assert "What is this?<|im_end|>" in plain
    loaded, found = read(wrapped), []
    for colour in (0, 255):
        pixels = np.full((48, 64, 3), colour, dtype=np.uint8)
        inputs = processor(text=said, images=[Image.fromarray(pixels)], return_tensors="pt")
        assert int((inputs["input_ids"] == loaded.config.image_token_id).sum()) == TOKENS
        with torch.inference_mode():
            found.append(loaded(**inputs).logits[0, -1])
    assert not found[0].equal(found[1])


def test_the_same_weights_every_time(small_model: Path, wrapped: Path, tmp_path: Path) -> None:
    one = open_checkpoint(wrapped)
    two = open_checkpoint(wrap_vision(small_model, tmp_path / "again"))
    assert one.digests() == two.digests()


def test_only_a_llama_is_wrapped(tmp_path: Path) -> None:
    source = model("qwen2", tmp_path / "source")
    with pytest.raises(InputError, match="is a qwen2"):
        wrap_vision(source, tmp_path / "vision")
    assert not (tmp_path / "vision").exists()
