"""KL from the likeliest tokens of both models, against the whole vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.validation.ask.likeliest import Divergence, divergence
from quantkit.validation.ask.text import QuantizedText, measure_baseline, measure_quantized
from quantkit.validation.judge.metrics import PerWindow, text_metrics
from quantkit.validation.subjects.base import TOP, Opening, TopLogprobs
from quantkit.validation.subjects.builtin import Builtin, open_builtin
from tests.support.rtn import rtn

LENGTH = 128


@pytest.fixture(scope="module")
def windows(small_model: Path) -> NDArray[np.int64]:
    from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
    from quantkit.validation.ask.data import eval_text

    tokenizer = load_tokenizer(read_tokenizer_info(small_model))
    return eval_text(None, tokenizer, 8, LENGTH).windows


def scores(subject: Builtin, windows: NDArray[np.int64]) -> torch.Tensor:
    """Log-probabilities [n × (length - 1), vocabulary] of what follows."""
    parts = [found[:, :-1].float().log_softmax(-1) for _, found in subject.logits(windows)]
    return torch.cat(parts).flatten(0, 1)


def estimated(base: torch.Tensor, ours: torch.Tensor, top: int = TOP) -> Divergence:
    """From the likeliest tokens of both."""
    (kept, ids), (our_kept, our_ids) = base.topk(top), ours.topk(top)
    return divergence(
        ids.int().numpy(), kept.float().numpy(), our_ids.int().numpy(), our_kept.float().numpy()
    )


def exact(base: torch.Tensor, ours: torch.Tensor) -> NDArray[np.float64]:
    return (base.exp() * (base - ours)).sum(-1).double().numpy()


class Engine:
    """A subject that tells its likeliest tokens, as engines do, and no logits."""

    def __init__(self, subject: Builtin) -> None:
        self._subject = subject

    def top_logprobs(self, windows: NDArray[np.int64], progress: object = None) -> TopLogprobs:
        whole = scores(self._subject, windows)
        following = torch.from_numpy(windows[:, 1:]).reshape(-1, 1)
        kept, ids = whole.topk(TOP)
        shape = (len(windows), windows.shape[1] - 1)
        return TopLogprobs(
            whole.gather(-1, following).reshape(shape).numpy(),
            ids.int().reshape(*shape, TOP).numpy(),
            kept.reshape(*shape, TOP).numpy(),
        )


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_the_estimate_is_that_of_the_whole_vocabulary(
    scheme: str, small_model: Path, windows: NDArray[np.int64], tmp_path: Path
) -> None:
    baseline = open_builtin(small_model, Opening("cpu"))
    made = rtn(small_model, tmp_path / "made", SCHEMES[scheme].with_weight(group_size=64))
    quantized = open_builtin(made, Opening("cpu"))
    base, ours = scores(baseline, windows), scores(quantized, windows)
    wanted, found = exact(base, ours), estimated(base, ours)
    assert found.value.mean() == pytest.approx(wanted.mean(), rel=0.05)
    assert (found.low <= wanted + 1e-4).all()
    assert found.low.mean() <= wanted.mean() <= found.high.mean()

    theirs = measure_baseline(Engine(baseline), windows, None)  # type: ignore[arg-type]
    said = measure_quantized(Engine(quantized), windows, theirs, None)  # type: ignore[arg-type]
    assert said.kl is not None
    assert said.agrees is not None
    assert said.kl.mean() == pytest.approx(found.value.mean(), rel=1e-4)
    assert said.agrees.mean() == pytest.approx(
        float((base.topk(TOP).indices[:, 0] == ours.topk(TOP).indices[:, 0]).float().mean())
    )
    metrics = text_metrics(PerWindow.of(theirs, said), said)
    interval = metrics["kl_mean"].interval
    assert interval is not None
    assert interval[0] < found.low.mean() < found.high.mean() < interval[1]


@pytest.mark.parametrize("noise", [0.05, 0.5, 1.5])
def test_gaps_that_are_normal_are_estimated_well(noise: float) -> None:
    """Logits of 20,000 tokens with noise on each; 256 of them hold half of the mass."""
    dice = torch.Generator().manual_seed(0)
    logits = 2.5 * torch.randn(256, 20_000, generator=dice)
    base = logits.log_softmax(-1)
    ours = (logits + noise * torch.randn(logits.shape, generator=dice)).log_softmax(-1)
    assert 0.3 < 1 - base.topk(TOP).values.exp().sum(-1).mean() < 0.7
    wanted, found = exact(base, ours), estimated(base, ours)
    assert found.value.mean() == pytest.approx(wanted.mean(), rel=0.1)
    assert (found.low <= wanted + 1e-4).all()
    assert found.high.mean() > wanted.mean()


def test_nothing_lost_is_zero_and_a_whole_vocabulary_is_exact() -> None:
    dice = torch.Generator().manual_seed(0)
    base = torch.randn(8, 64, generator=dice).log_softmax(-1)
    ours = torch.randn(8, 64, generator=dice).log_softmax(-1)
    same = estimated(base, base, 16)
    assert np.abs(same.value).max() < 1e-5
    assert np.abs(same.high).max() < 1e-5
    found = estimated(base, ours, 64)
    assert found.value == pytest.approx(exact(base, ours), abs=1e-5)
    assert found.low == pytest.approx(found.high, abs=1e-5)


def test_models_that_have_nothing_in_common_are_far_apart() -> None:
    base = torch.full((2, 1000), -20.0)
    ours = base.clone()
    base[:, :5], ours[:, 500:505] = 0.0, 0.0
    found = estimated(base.log_softmax(-1), ours.log_softmax(-1), 20)
    assert np.isfinite(found.high).all()
    assert (found.low > 1).all()


def test_tokens_that_are_ruled_out_and_numbers_that_are_none() -> None:
    base = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    ours = base.clone()
    ours[:, 8:] = -torch.inf
    ours = ours.log_softmax(-1)
    assert np.isfinite(estimated(base, ours, 16).value).all()
    assert np.isfinite(estimated(ours, base, 16).value).all()
    assert np.isnan(estimated(base, torch.full_like(base, torch.nan), 16).value).all()


def test_the_interval_of_an_estimate_goes_from_bound_to_bound() -> None:
    kl = np.linspace(0.1, 0.2, 16 * 4, dtype=np.float32).reshape(16, 4)
    text = QuantizedText(
        -kl, kl, np.ones_like(kl, dtype=bool), (kl * np.float32(0.5), kl * np.float32(2))
    )
    windows = PerWindow(np.zeros(16), np.zeros(16), kl.mean(1), np.ones(16), None,
                        kl.mean(1) / 2, kl.mean(1) * 2)  # fmt: skip
    found = text_metrics(windows, text)
    for name, value in (("kl_mean", 0.15), ("kl_p99", 0.2), ("kl_max", 0.2)):
        interval = found[name].interval
        assert interval is not None, name
        assert interval[0] < value * 0.6, name
        assert interval[1] > value * 1.8, name
