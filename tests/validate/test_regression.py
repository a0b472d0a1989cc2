"""A report against an earlier one: what moved, and what is only noise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.validation.judge.bootstrap import Measured, missing
from quantkit.validation.judge.regression import compare, no_longer_measured, refuse_incomparable
from quantkit.validation.reports.earlier import read_report
from tests.support.cli import quantkit, refused
from tests.support.rtn import rtn
from tests.support.validating import damaged, measured, scaled


def document(nll: list[float], **metrics: float) -> dict[str, Any]:
    return {
        "metrics": {name: {"value": v, "interval": None} for name, v in metrics.items()},
        "windows": {"nll": nll, "kl": None, "agreement": None},
        "right": {"quantized": [1] * 20},
    }


def verdict(shift: NDArray[np.float64]) -> str:
    old_nll = np.linspace(2.0, 4.0, len(shift))
    old = document(old_nll.tolist(), ppl_ratio=1.05)
    new = document((old_nll + shift).tolist())
    value = 1.05 * float(np.exp(shift.mean()))
    (change,) = compare({"ppl_ratio": Measured(value, sampled=True)}, new, old)
    return change.verdict


def test_windows_are_compared_in_pairs() -> None:
    noise = np.tile([0.05, -0.05], 10)
    assert verdict(np.zeros(20)) == "same"
    assert verdict(noise + 0.001) == "noise"
    assert verdict(np.full(20, 0.001)) == "noise"  # sure, and too small to matter
    assert verdict(noise / 10 + 0.03) == "worse"
    assert verdict(noise / 10 - 0.03) == "better"


def test_exact_metrics_move_by_any_amount_over_their_tolerance() -> None:
    old = document([1.0] * 20, weight_sqnr_margin=3.0, verify_errors=0)
    now = {"weight_sqnr_margin": Measured(1.0), "verify_errors": Measured(1.0)}
    found = {c.metric: c.verdict for c in compare(now, document([1.0] * 20), old)}
    assert found == {"weight_sqnr_margin": "worse", "verify_errors": "worse"}


def moved(name: str, old: float | None, new: Measured, why: str = "") -> list[str]:
    before = document([1.0] * 4)
    before["metrics"] = {name: {"value": old, "interval": None, "why": why}}
    return [c.verdict for c in compare({name: new}, document([1.0] * 4), before)]


def test_what_is_no_number_is_worse() -> None:
    """JSON has null for NaN; what was not measured says why."""
    broken = Measured(math.nan, sampled=True)
    assert moved("kl_mean", 0.1, broken) == ["worse"]
    assert moved("top1_agreement", 0.1, broken) == ["worse"]
    assert moved("kl_mean", None, broken) == ["same"]
    assert moved("kl_mean", None, Measured(0.1, sampled=True)) == ["better"]
    assert moved("kl_mean", None, Measured(0.1, sampled=True), "no logits") == []


def test_too_few_samples_are_no_certainty() -> None:
    few = Measured(1.06, sampled=True)
    assert moved("ppl_ratio", 1.05, few) == ["undecided"]
    assert moved("ppl_ratio", 1.0599, few) == ["noise"]
    assert moved("verify_errors", 0.0, Measured(1.0)) == ["worse"]


def test_what_was_measured_before_and_is_not_now_is_named() -> None:
    old = document([1.0] * 20, prefill_speedup=1.5, kl_mean=0.1, ppl_ratio=1.0)
    old["metrics"]["mcq_drop"] = {"value": None, "interval": None, "why": "not measured"}
    now = {"prefill_speedup": missing("not measured"), "ppl_ratio": Measured(1.0)}
    assert no_longer_measured(now, old) == ["prefill_speedup", "kl_mean"]


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"metrics": None}, "metrics is no object"),
        ({"metrics": {"kl_mean": {"value": "x"}}}, "metrics.kl_mean has no value"),
        ({"metrics": {"kl_mean": {"value": 1, "interval": [1]}}}, "is no pair of numbers"),
        ({"windows": {"nll": "x"}}, "windows.nll is no list of numbers"),
        ({"right": [1]}, "right is no object"),
        ({"engine": 5}, "engine is no object"),
        ({"schema_version": 2}, "schema_version 2"),
    ],
)
def test_a_damaged_report_is_refused_when_it_is_read(
    change: dict[str, Any], telling: str, tmp_path: Path
) -> None:
    parts: dict[str, Any] = {key: {} for key in ("checkpoint", "baseline", "text", "engine")}
    sound = {"kind": "quantkit.validation", "schema_version": 1, **document([1.0] * 8), **parts}
    file = tmp_path / "report.json"
    file.write_text(json.dumps(sound))
    assert read_report(file) == sound
    file.write_text(json.dumps({**sound, **change}))
    with pytest.raises(InputError) as caught:
        read_report(file)
    assert telling in caught.value.message


def test_a_report_that_nests_too_deeply_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("[" * 100_000)
    with pytest.raises(InputError, match="nests too deeply"):
        read_report(file)


@pytest.mark.parametrize(
    ("part", "key"),
    [("checkpoint", "recipe_digest"), ("baseline", "fingerprint"), ("text", "digest"),
     ("engine", "name")],
)  # fmt: skip
def test_another_recipe_model_text_or_engine_is_refused(part: str, key: str) -> None:
    same = {
        "checkpoint": {"recipe_digest": "a", "method": "m"},
        "baseline": {"fingerprint": "b"},
        "text": {"digest": "c"},
        "engine": {"name": "builtin", "kernel": "auto"},
    }
    refuse_incomparable(same, same)
    other = {**same, part: {**same[part], key: "other"}}
    with pytest.raises(InputError, match="earlier report is of another"):
        refuse_incomparable(same, other)


@pytest.mark.engine
def test_command_ends_with_4_when_something_got_worse(small_model: Path, tmp_path: Path) -> None:
    good = rtn(small_model, tmp_path / "good", SCHEMES["w8a8_dynamic"])
    before = tmp_path / "before.json"
    earlier = measured(good, small_model).to_json()
    earlier["metrics"]["decode_speedup"] = {"value": 1.5, "interval": None, "why": ""}
    before.write_text(json.dumps(earlier))
    off = ("--gate", "weight_sqnr_margin>=-99", "--gate", "verify_errors<=9")
    loose = [word for m in ("ppl_ratio", "kl_mean", "canary_drift", "canary_failures", "mcq_drop")
             for word in ("--gate", f"{m}<=99")]  # fmt: skip
    asked: tuple[str | Path, ...] = (
        "--baseline", small_model, "--samples", "8", "--no-throughput", "--broken-baseline",
        *off, *loose, "--against", before,
    )  # fmt: skip
    again = quantkit("validate", good, *asked)
    assert again.code == 0, again.out + again.err
    assert "nothing moved" in again.out
    assert "the earlier report has decode_speedup, which this run did not measure" in " ".join(
        again.err.split()
    )
    worse = damaged(good, tmp_path / "worse", scaled("weight_scale"))
    run = quantkit("validate", worse, *asked)
    assert run.code == 4, run.out + run.err
    assert "weight_sqnr_margin" in run.out
    assert "worse" in run.out
    other: tuple[str | Path, ...] = (
        "--baseline",
        small_model,
        "--samples",
        "9",
        "--against",
        before,
    )
    refused(quantkit("validate", good, *other), 1, "of another text")
