"""Multi-modal models: logits and generated text are those of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from quantkit.runtime.load import load
from tests.support.tokenized_towers import FAMILIES, multimodal
from tests.support.tokenizer import VOCABULARY

NO_STOP: list[int] = []
QUICK = {"gemma3", "idefics3", "llava", "qwen2_5_vl"}
CONVERTED = {"ernie4_5_vl_moe", "kimi_k25"}
"""Families of which Transformers joins or splits tensors outside of the language model."""


@torch.inference_mode()
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
        for family in sorted(FAMILIES.keys() - CONVERTED)
    ],
)
def test_logits_and_text_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    path = multimodal(family, tmp_path / family)
    theirs: Any = AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = load(path, dtype="float32")
    ids = torch.arange(11, VOCABULARY, 13)[None]
    assert not ours.lean
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
    wanted = theirs.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, max_new_tokens=6, eos_token_id=NO_STOP), wanted)
