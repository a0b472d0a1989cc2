"""Multi-modal models: logits, generated text and what is said of pictures are those of
Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.runtime.load import load
from quantkit.validation.subjects.embeddings import COLUMNS, watch_embeddings
from tests.support.families import model
from tests.support.rtn import rtn
from tests.support.tokenized_towers import END, FAMILIES, IMAGE, START, multimodal
from tests.support.tokenizer import VOCABULARY

NO_STOP: list[int] = []
QUICK = {"ernie4_5_vl_moe", "gemma3", "idefics3", "kimi_k25", "llava", "qwen2_5_vl"}
SHOWN = QUICK - {"ernie4_5_vl_moe", "kimi_k25"}
"""Families that are shown a picture here; the others' tensors are joined or split by Transformers
outside of the language model."""
COARSE = {
    "fp8_dynamic": (SCHEMES["fp8_dynamic"], 0.2),
    "w4a16": (SCHEMES["w4a16"].with_weight(granularity="group", group_size=32), 0.6),
}
"""Scheme → how far logits may be off, of their norm."""


@torch.inference_mode()
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
        for family in sorted(FAMILIES)
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


def seen(family: str) -> dict[str, torch.Tensor]:
    """One picture of random pixels that becomes four tokens, as the family's processor gives it."""
    drawn = torch.Generator().manual_seed(1)
    if family == "qwen2_5_vl":
        kinds = torch.zeros(1, 30, dtype=torch.int64)
        kinds[0, 5:9] = 1
        return {
            "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=drawn),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": kinds,
        }
    side = 56 if family == "idefics3" else 28
    pixels = torch.randn(1, 3, side, side, generator=drawn)
    if family == "idefics3":
        return {"pixel_values": pixels[None]}
    kinds = torch.zeros(1, 30, dtype=torch.int64)
    kinds[0, 5:9] = 1
    return {"pixel_values": pixels, **({"token_type_ids": kinds} if family == "gemma3" else {})}


@torch.inference_mode()
@pytest.mark.parametrize("family", sorted(SHOWN))
def test_logits_after_a_picture_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    path = multimodal(family, tmp_path / family)
    theirs: Any = AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = load(path, dtype="float32")
    ids = torch.arange(11, 41)[None]
    ids[0, 4:10] = torch.tensor([START, IMAGE, IMAGE, IMAGE, IMAGE, END])
    pictures = seen(family)
    wanted = theirs(ids, **pictures).logits
    network: Any = ours.network
    with watch_embeddings(network.model) as embeddings:
        assert torch.allclose(ours(ids, pictures=pictures).logits, wanted, atol=1e-5)
    one = embeddings.sketch()
    assert one is not None
    assert one.shape == (30, COLUMNS)
    other = {**pictures, "pixel_values": -pictures["pixel_values"]}
    with watch_embeddings(network.model) as embeddings:
        changed = ours(ids, pictures=other).logits
    assert not torch.allclose(changed[0, -1], wanted[0, -1], atol=1e-3)
    two = embeddings.sketch()
    assert two is not None
    differ = (one - two).abs().amax(-1) > 1e-4
    assert differ.nonzero().flatten().tolist() == [5, 6, 7, 8]  # the picture's, and no other


@torch.inference_mode()
@pytest.mark.parametrize("scheme", sorted(COARSE))
def test_words_and_pictures_have_experts_of_their_own(scheme: str, tmp_path: Path) -> None:
    """ERNIE VL's file counts the experts of pictures on from those of words."""
    path = multimodal("ernie4_5_vl_moe", tmp_path / "source")
    theirs: Any = AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = load(path, dtype="float32")
    rounded = load(rtn(path, tmp_path / "out", COARSE[scheme][0]), dtype="float32")
    ids = torch.arange(11, 41)[None]
    kinds = torch.zeros_like(ids)
    kinds[0, 5:25] = 1
    seen = {"moe_mm_token_type_ids": kinds}
    wanted = theirs(ids, **seen).logits
    assert torch.allclose(ours(ids, pictures=seen).logits, wanted, atol=1e-5)
    assert not torch.allclose(ours(ids).logits, wanted, atol=1e-2)
    found = (rounded(ids, pictures=seen).logits - wanted).norm() / wanted.norm()
    assert 1e-3 < found < COARSE[scheme][1]


def test_a_model_without_a_tower_is_shown_nothing(tmp_path: Path) -> None:
    ours = load(model("qwen2", tmp_path / "text"), device="cpu")
    with pytest.raises(InputError) as caught:
        ours(torch.tensor([[5, 6]]), pictures={"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert caught.value.code == "runtime.no_tower"
