"""Networks of several families: logits and generated text are those of Transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.runtime.load import load
from quantkit.runtime.network.attention import attend
from quantkit.validation.ask.canary import answer, answer_tokens
from quantkit.validation.ask.choices import choice_logprobs, facts
from quantkit.validation.ask.lm_eval_model import _answers, _split
from quantkit.validation.subjects.builtin import Builtin
from quantkit.validation.subjects.throughput import fitting, measure
from tests.support.helpers import edit_tensors
from tests.support.rtn import rtn

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[bool, dict[str, Any]]] = {
    # model type: (computed by the lean decoder, what is special)
    "llama": (True, {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}),
    "qwen2": (True, {"tie_word_embeddings": True}),
    "qwen3": (True, {"head_dim": 32}),
    "mistral": (False, {"sliding_window": 8}),
    "gemma2": (False, {"head_dim": 32, "sliding_window": 8}),
    "phi3": (False, {}),
    "gpt_neox": (False, {}),
}
NO_STOP: list[int] = []


def random_model(name: str, path: Path) -> Any:
    """A small random model of a family, saved in `path`."""
    config = AutoConfig.for_model(name, **SMALL, **FAMILIES[name][1])
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(std=0.1) if weight.dim() > 1 else weight.data.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's name, the directory of a random model of it, Transformers' module."""
    path = tmp_path_factory.mktemp("family") / request.param
    return request.param, path, random_model(request.param, path)


def prompts(count: int) -> torch.Tensor:
    return torch.randint(3, 300, (count, 20), generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def test_logits_and_text_are_those_of_transformers(family: Any) -> None:
    name, path, theirs = family
    ours, ids = load(path), prompts(2)
    assert ours.lean == FAMILIES[name][0]
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
    wanted = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, eos_token_id=NO_STOP), wanted)


@torch.inference_mode()
def test_padding_does_not_change_a_sequence(family: Any) -> None:
    _, path, _ = family
    ours, ids = load(path), prompts(3)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[2, :3] = 0
    together = ours.generate(ids * mask, mask, max_new_tokens=8, eos_token_id=NO_STOP)
    for row, skipped in ((0, 11), (1, 0), (2, 3)):
        alone = ours.generate(ids[row : row + 1, skipped:], max_new_tokens=8, eos_token_id=NO_STOP)
        assert torch.equal(together[row, skipped:], alone[0])


@torch.inference_mode()
def test_a_cache_may_be_filled_in_pieces(family: Any) -> None:
    _, path, _ = family
    ours, ids = load(path), prompts(2)
    whole = ours(ids).logits
    first = ours(ids[:, :7], use_cache=True)
    second = ours(ids[:, 7:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat((first.logits, second.logits), 1), whole, atol=1e-5)


@pytest.fixture(scope="module")
def demo(small_model: Path) -> Any:
    return load(small_model)


def test_a_sequence_ends_with_a_stop_token_and_padding(demo: Any) -> None:
    ids = torch.randint(3, 49000, (3, 9), generator=torch.Generator().manual_seed(0))
    free = demo.generate(ids, max_new_tokens=12, eos_token_id=NO_STOP)
    stop = int(free[0, 12])
    stopped = demo.generate(ids, max_new_tokens=12, eos_token_id=stop, pad_token_id=7)
    assert stopped.shape[1] <= free.shape[1]
    for row in range(3):
        new = free[row, 9:].tolist()
        kept = new[: new.index(stop) + 1] if stop in new else new
        assert stopped[row, 9 : 9 + len(kept)].tolist() == kept
        assert set(stopped[row, 9 + len(kept) :].tolist()) <= {7}


def test_sampling_repeats_with_its_seed_and_keeps_to_the_likely(demo: Any) -> None:
    ids = torch.randint(3, 49000, (2, 9), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "eos_token_id": NO_STOP}
    one = demo.generate(ids, seed=1, **settings)
    assert torch.equal(one, demo.generate(ids, seed=1, **settings))
    assert not torch.equal(one, demo.generate(ids, seed=2, **settings))
    greedy = demo.generate(ids, max_new_tokens=6, eos_token_id=NO_STOP)
    assert torch.equal(demo.generate(ids, top_k=1, **settings), greedy)
    assert torch.equal(demo.generate(ids, top_p=1e-6, **settings), greedy)


def test_what_generation_cannot_do_is_refused(demo: Any) -> None:
    ids = torch.full((1, 4), 5)
    with pytest.raises(InputError) as caught:
        demo.generate(ids, torch.tensor([[1, 1, 1, 0]]))
    assert caught.value.code == "runtime.right_padding"
    with pytest.raises(InputError) as caught:
        demo.generate(ids, do_sample=True, temperature=0.0)
    assert caught.value.code == "runtime.sampling"


@torch.inference_mode()
def test_a_quantized_gpt_neox_finds_its_head(tmp_path: Path) -> None:
    theirs = random_model("gpt_neox", tmp_path / "model")
    assert open_checkpoint(tmp_path / "model").tensors.keys() >= {"embed_out.weight"}
    path = rtn(tmp_path / "model", tmp_path / "out", SCHEMES["w8a16"])
    ours, ids = load(path), prompts(2)
    assert ours.layers
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=0.5)


def test_a_missing_bias_is_refused(tmp_path: Path) -> None:
    random_model("qwen2", tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert caught.value.code == "runtime.missing_tensor"
    assert "verify" not in caught.value.hint  # which refuses a model that is not quantized
    assert "layers.1.self_attn.k_proj.bias" in caught.value.message


def test_a_network_with_few_learned_positions_is_measured_within_them(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "opt", vocab_size=300, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=96, word_embed_proj_dim=64,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(tmp_path)
    runtime = load(tmp_path)
    rows = measure(runtime, load_seconds=0, batches=(1,), repeats=1).rows
    assert (rows[0].prompt_tokens, rows[0].new_tokens) == (64, 32)
    subject, questions = Builtin(runtime, 0), facts(2)
    words = Words()
    prompts = [list(range(3, 3 + n)) for n in (20, 90)]
    assert answer_tokens(prompts, 96) == 6
    assert [len(said) for said in answer(subject, prompts, answer_tokens(prompts, 96), None)]
    long = [replace(q, prompt=q.prompt * 9) for q in questions]
    assert np.isfinite(choice_logprobs(subject, words, long, longest=96)).all()  # type: ignore[arg-type]
    assert len(_split(words, 96, False, "a" * 300, "b" * 20)[0]) == 76  # type: ignore[arg-type]
    assert len(_answers(subject, words, 96, False, ["a" * 300], {})) == 1  # type: ignore[arg-type]


class Words:
    """A tokenizer of letters."""

    def encode(self, text: str, special: bool) -> list[int]:
        return [3 + ord(letter) % 200 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("longest", "wanted"), [(None, (256, 32)), (4096, (256, 32)), (128, (96, 32)), (16, (8, 8))]
)
def test_prompts_and_answers_fit_the_positions(
    longest: int | None, wanted: tuple[int, int]
) -> None:
    assert fitting(256, 32, longest) == wanted


@pytest.mark.parametrize(("heads", "kv_heads", "count"), [(9, 3, 300), (4, 4, 64), (8, 1, 129)])
def test_attention_in_blocks_is_causal_attention(heads: int, kv_heads: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    q, k, v = (
        torch.randn(2, number, count, 32, generator=generator).bfloat16()
        for number in (heads, kv_heads, kv_heads)
    )
    found = attend(q, k, v, None, causal=True).float()
    keys, values = (x.float().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    exact = scaled_dot_product_attention(q.float(), keys, values, is_causal=True)
    wanted = exact.transpose(1, 2).flatten(2)
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3
    v[:, :, -1] += 1000
    assert torch.equal(attend(q, k, v, None, causal=True).float()[:, :-1], found[:, :-1])
