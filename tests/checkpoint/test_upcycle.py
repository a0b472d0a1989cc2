"""A dense model upcycled to a mixture of experts computes nearly what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.upcycle import Family, upcycle
from quantkit.errors import InputError
from tests.support.families import model

IDS = torch.arange(100, 164).unsqueeze(0)


def logits(path: Path) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.inference_mode():
        found: torch.Tensor = loaded(IDS).logits.float()
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_an_upcycled_model_answers_as_the_dense_one(
    small_model: Path, tmp_path: Path, family: Family
) -> None:
    made = upcycle(small_model, tmp_path / "moe", 4, family)
    dense, mixture = (logits(path).log_softmax(-1) for path in (small_model, made))
    kl = (dense.exp() * (dense - mixture)).sum(-1).mean()
    assert 0 < float(kl) < 0.05


def test_the_same_weights_every_time_and_other_experts(small_model: Path, tmp_path: Path) -> None:
    one = open_checkpoint(upcycle(small_model, tmp_path / "one", 3))
    two = open_checkpoint(upcycle(small_model, tmp_path / "two", 3))
    assert [one.digest(name) for name in one.tensors] == [two.digest(name) for name in two.tensors]
    experts = [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(3)]
    assert len({one.digest(name) for name in experts}) == 3
    weight, dense = one.tensor(experts[0]).float(), open_checkpoint(small_model)
    source = dense.tensor("model.layers.1.mlp.down_proj.weight").float()
    assert float((weight - source).std() / source.std()) == pytest.approx(0.05, rel=0.02)


def test_shards_are_listed_and_hold_what_fits(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.checkpoint.upcycle.SHARD_BYTES", 40_000_000)
    made = open_checkpoint(upcycle(small_model, tmp_path / "moe", 4))
    assert len(made.files) > 2
    assert all(file.stat().st_size < 60_000_000 for file in made.files)


def test_only_a_llama_is_upcycled(tmp_path: Path) -> None:
    source = model("qwen2", tmp_path / "source")
    with pytest.raises(InputError, match="is a qwen2"):
        upcycle(source, tmp_path / "moe", 4)
    assert not (tmp_path / "moe").exists()
