"""What is measured on text, against plain torch and Transformers; the canary and the facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.validation.ask.canary import canary_prompts, problem, repetition
from quantkit.validation.ask.choices import continuation_logprobs, facts, right
from quantkit.validation.ask.data import eval_text
from quantkit.validation.ask.text import (
    BaselineText,
    divergence,
    keep,
    measure_baseline,
    measure_quantized,
)
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import Builtin, open_builtin
from tests.support.rtn import rtn


@pytest.fixture(scope="module")
def subject(small_model: Path) -> Builtin:
    return open_builtin(small_model, Opening("cpu"))


@pytest.fixture(scope="module")
def windows(small_model: Path) -> NDArray[np.int64]:
    tokenizer = load_tokenizer(read_tokenizer_info(small_model))
    return eval_text(None, tokenizer, 3, 64).windows


@pytest.fixture(scope="module")
def baseline(subject: Builtin, windows: NDArray[np.int64]) -> BaselineText:
    return measure_baseline(subject, windows, None)


def test_log_likelihoods_are_those_of_transformers(
    small_model: Path, subject: Builtin, windows: NDArray[np.int64]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = model(torch.from_numpy(windows)).logits.float()
    wanted = logits[:, :-1].log_softmax(-1)
    wanted = wanted.gather(-1, torch.from_numpy(windows)[:, 1:, None])[..., 0]
    found = torch.from_numpy(subject.logprobs(windows))
    # Both round to bfloat16, in another order; these three layers give log-likelihoods of -20.
    assert (found - wanted).abs().mean() < 0.005 * wanted.abs().mean()


def test_kl_of_a_model_and_itself_is_zero(
    subject: Builtin, windows: NDArray[np.int64], baseline: BaselineText
) -> None:
    same = measure_quantized(subject, windows, baseline, None)
    assert same.kl is not None
    assert same.agrees is not None
    assert np.abs(same.kl).max() < 1e-4
    assert same.agrees.all()
    assert np.allclose(same.logprobs, baseline.logprobs, atol=1e-5)


def test_kl_is_that_of_the_whole_vocabulary(
    small_model: Path,
    subject: Builtin,
    windows: NDArray[np.int64],
    baseline: BaselineText,
    tmp_path: Path,
) -> None:
    quantized = open_builtin(
        rtn(small_model, tmp_path / "w4", SCHEMES["w4a16"].with_weight(group_size=64)),
        Opening("cpu"),
    )
    found = measure_quantized(quantized, windows, baseline, None)
    whole = []
    for (_, p), (_, q) in zip(subject.logits(windows), quantized.logits(windows), strict=True):
        base, ours = p[:, :-1].float().log_softmax(-1), q[:, :-1].float().log_softmax(-1)
        whole.append((base.exp() * (base - ours)).sum(-1))
    exact = torch.cat(whole).numpy()
    assert found.kl is not None
    assert found.kl.mean() == pytest.approx(exact.mean(), rel=0.02)
    assert np.corrcoef(found.kl.flatten(), exact.flatten())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("noise", "scale", "p99", "spread"), [(0.3, 1.0, 0.35, 0.008), (1.5, 2.0, 0.2, 0.3)]
)
def test_kl_of_single_tokens_is_estimated_without_bias_and_with_little_noise(
    noise: float, scale: float, p99: float, spread: float
) -> None:
    """Logits so flat that most of the mass is in what was drawn, and a model that is far off."""
    dice = torch.Generator().manual_seed(1)
    base = (torch.randn(600, 6000, generator=dice) * scale).log_softmax(-1)
    ours = (base + torch.randn(600, 6000, generator=dice) * noise).log_softmax(-1)
    exact = (base.exp() * (base - ours)).sum(-1)
    found = []
    for seed in range(8):
        ids = keep(base, torch.Generator().manual_seed(seed))
        found.append(divergence(base.gather(-1, ids), ours.gather(-1, ids)))
    errors = torch.stack(found) - exact
    assert float(errors.std()) < spread
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / errors.numel() ** 0.5
    wanted = exact.quantile(0.99)
    assert float(found[0].quantile(0.99)) == pytest.approx(float(wanted), rel=p99)


def test_kl_where_the_rest_has_no_mass_and_where_a_token_is_ruled_out() -> None:
    base = torch.full((1, 320), -50.0)
    base[0, 0] = 0.0
    ours = base.clone()
    ours[0, 300] = 80.0  # drawn from a rest of mass 0
    assert float(divergence(base, ours).abs()) < 1e-4
    ours[0, 0] = -torch.inf
    assert float(divergence(base, ours)) == torch.inf
    assert bool(divergence(base, ours * torch.nan).isnan())


def test_continuations_are_scored_after_their_context_alone(subject: Builtin) -> None:
    pairs = [([5, 6, 7], [8, 9]), ([5], [6, 7, 8, 9]), ([5, 6, 7, 8], [9])]
    totals = continuation_logprobs(subject, pairs)
    row = subject.logprobs(np.array([[5, 6, 7, 8, 9]]))[0]
    assert totals == pytest.approx([row[2:].sum(), row.sum(), row[3:].sum()], abs=0.05)


def test_facts_are_whole_and_answered_by_the_likeliest_choice() -> None:
    questions = facts()
    assert len(questions) == 374
    some = facts(96)
    assert len(some) == 96
    assert (some[0], some[-1]) == (questions[0], questions[-1])
    assert all(0 <= q.answer < len(q.choices) == 4 for q in questions)
    sure = np.array([[float(index == q.answer) for index in range(4)] for q in questions])
    assert right(sure, questions).all()
    assert not right(-sure, questions).any()
    assert not right(np.full((374, 4), np.nan), questions).any()


@pytest.mark.parametrize(
    ("ids", "period"),
    [
        ([9] * 30, 1),
        ([9, 9, 9, 9], 1),
        ([1, 2, 3, *[7, 8] * 12], 2),
        ([*range(40)], 0),
        ([*range(30), 5, 5, 5], 0),
        ([1, 2, 3], 0),
        ([], 0),
    ],
)
def test_loops_are_found(ids: list[int], period: int) -> None:
    assert repetition(ids) == period


def test_canary_speaks_through_the_chat_template(small_model: Path) -> None:
    tokenizer = load_tokenizer(read_tokenizer_info(small_model))
    texts, prompts = canary_prompts(small_model, tokenizer)
    assert texts[0] == "What is the capital of France?"
    assert tokenizer.decode(prompts[0]).endswith(f"{texts[0]}<|im_end|>\n<|im_start|>assistant\n")
    assert problem(tokenizer.encode("Paris.", False), tokenizer) == ""
    assert problem(tokenizer.encode(" \n", False), tokenizer) == "empty"
    assert "loops" in problem(tokenizer.encode("!" * 120, False), tokenizer)


def test_canary_goes_on_with_texts_where_there_is_no_template(
    small_model: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((small_model / name).read_bytes())
    tokenizer = load_tokenizer(read_tokenizer_info(tmp_path))
    texts, prompts = canary_prompts(tmp_path, tokenizer)
    assert texts[0] == "The capital of France is"
    assert tokenizer.decode(prompts[0]) == texts[0]
