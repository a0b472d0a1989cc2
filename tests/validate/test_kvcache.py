"""The arm that tells what a quantized key-value cache costs, and scales that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.validation.ask.data import eval_text
from quantkit.validation.ask.kvcache import ask_cache
from quantkit.validation.ask.text import measure_baseline
from quantkit.validation.judge.default_gates import default_gates
from quantkit.validation.judge.metrics import PerWindow, cache_metrics
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import open_builtin
from tests.support.kvcache import calibrated, with_cache
from tests.support.validating import Quiet, measured, verdicts

Scales = dict[int, tuple[float, float]]


@pytest.fixture(scope="module")
def windows(small_model: Path) -> NDArray[np.int64]:
    tokenizer = load_tokenizer(read_tokenizer_info(small_model))
    return eval_text(None, tokenizer, 4, 128).windows


@pytest.fixture(scope="module")
def scales(
    checkpoints: dict[str, Path], windows: NDArray[np.int64],
    tmp_path_factory: pytest.TempPathFactory,
) -> Scales:  # fmt: skip
    """As calibration on other text than the last window finds them."""
    ids = torch.from_numpy(windows[:2])
    return calibrated(checkpoints["8"], ids, tmp_path_factory.mktemp("cache") / "work")


@pytest.mark.parametrize(
    ("factor", "least", "most"), [(1.0, 0.8, 1.25), (2.0, 1.6, 2.5), (0.5, 0.4, 0.625)]
)
def test_scales_are_held_against_what_the_text_makes(
    factor: float, least: float, most: float, checkpoints: dict[str, Path], scales: Scales,
    windows: NDArray[np.int64], tmp_path: Path,
) -> None:  # fmt: skip
    off = {index: (factor * keys, factor * values) for index, (keys, values) in scales.items()}
    subject = open_builtin(with_cache(checkpoints["8"], tmp_path / "held", off), Opening("cpu"))
    text = windows[2:]
    answers = ask_cache(subject, text, measure_baseline(subject, text, None), Quiet())
    assert answers is not None
    assert len(answers.scales) == 2 * len(scales)
    assert least < np.median(answers.scales) < most


def test_a_cache_in_16_bit_has_no_arm(
    checkpoints: dict[str, Path], windows: NDArray[np.int64]
) -> None:
    subject, ui = open_builtin(checkpoints["8"], Opening("cpu")), Quiet()
    baseline = measure_baseline(subject, windows[:1], None)
    assert ask_cache(subject, windows[:1], baseline, ui) is None
    assert ui.stages == []


def test_what_the_cache_costs_is_told_apart_from_the_weights() -> None:
    def windows(nll: float, kl: float) -> PerWindow:
        return PerWindow(np.zeros(8), np.full(8, nll), np.full(8, kl), None)

    found = cache_metrics(windows(0.3, 0.05), windows(0.2, 0.03), np.array([0.5, 0.4, 3.0]))
    assert found["kv_ppl_ratio"].value == pytest.approx(np.exp(0.1))
    assert found["kv_kl"].value == pytest.approx(0.02)
    assert found["kv_scale_off"].value == 2  # the middle one, either way
    nothing = cache_metrics(windows(0, 0), windows(0, 0), np.array([]))
    assert nothing["kv_scale_off"].value is None


@pytest.mark.parametrize(
    ("cache", "gated"), [("fp8", 3), ("fp8_cast", 3), ("nvfp4", 2), ("none", 0)]
)
def test_a_declared_cache_has_gates(cache: str, gated: int) -> None:
    gates = default_gates({"fp8_dynamic"}, kv_cache=cache)
    assert len([gate for gate in gates if gate.metric.startswith("kv_")]) == gated


@pytest.mark.engine
def test_scales_that_are_all_1_or_missing_fail(
    checkpoints: dict[str, Path], small_model: Path, scales: Scales, tmp_path: Path
) -> None:
    held = with_cache(checkpoints["8"], tmp_path / "good", scales)
    report = measured(held, small_model)
    assert verdicts(report)["kv_scale_off"] == "pass"
    assert {"kv_kl", "kv_ppl_ratio"} <= verdicts(report).keys()
    assert report.metrics["kl_of_rtn"].value == pytest.approx(1, abs=1e-6)  # the weights alone
    missing = measured(with_cache(checkpoints["8"], tmp_path / "none", {}), small_model)
    assert verdicts(missing)["kv_scale_off"] == "fail"
    assert any("every scale of the KV cache is 1" in note for note in missing.notes)
