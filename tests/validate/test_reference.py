"""The baseline rounded to nearest beside a checkpoint: rounded alike, tuned, damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.validation.reports.fill import in_words
from tests.support.validating import SWAPS, damaged, measured, verdicts

pytestmark = pytest.mark.engine


def test_a_rounded_checkpoint_is_its_own_reference(
    checkpoints: dict[str, Path], small_model: Path
) -> None:
    report = measured(checkpoints["4"], small_model)
    found = verdicts(report)
    assert found["kl_of_rtn"] == found["ppl_of_rtn"] == "pass"
    assert report.metrics["kl_of_rtn"].value == pytest.approx(1, abs=1e-6)
    assert report.metrics["ppl_of_rtn"].value == pytest.approx(1, abs=1e-6)
    document = report.to_json()["reference"]
    assert document["recovered"]["kl"] == pytest.approx(0, abs=1e-6)
    assert in_words(document) in report.notes


def test_a_damaged_one_is_worse_than_rounding(
    checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    copy = damaged(checkpoints["8"], tmp_path / "copy", SWAPS["gate and up"])
    report = measured(copy, small_model, "weight_sqnr_margin>=-99", "verify_errors<=99")
    assert verdicts(report)["kl_of_rtn"] == "fail"


def test_what_the_reference_loses_is_said_in_words() -> None:
    shares: dict[str, float | None] = {"kl": 0.44, "perplexity": 0.162}
    told = in_words({"perplexity": 32.6, "kl_mean": 0.407, "recovered": shares})
    assert "the perplexity 32.6 and the KL 0.407" in told
    assert told.endswith("the checkpoint recovers 44% in KL, 16% in perplexity")
    nothing = in_words({"perplexity": 1, "kl_mean": 0, "recovered": dict.fromkeys(shares)})
    assert nothing.endswith("nothing: there is none")
