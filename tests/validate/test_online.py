"""The third column: the baseline rounded while it loads, beside baseline and checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.backends.environments.managed import spec_named
from quantkit.validation.judge.bootstrap import Measured
from quantkit.validation.online import _outcome
from tests.support.cli import quantkit, refused


@pytest.mark.engine
def test_the_online_method_is_a_third_column(
    sealed: Path, small_model: Path, tmp_path: Path
) -> None:
    """INT8 weights and activations against MXFP8's: further from the baseline than INT8's."""
    files = [tmp_path / f"r.{end}" for end in ("md", "html")]
    run = quantkit(
        "validate", sealed, "--baseline", small_model, "--samples", "8", "--no-throughput",
        "--broken-baseline", "--against-online", "mxfp8", "--report", files[0],
        "--report", files[1], "--json",
    )  # fmt: skip
    online = run.document["online"]
    assert (online["engine"], online["method"], online["emulated"]) == ("vllm", "mxfp8", True)
    assert online["scheme"] == "mxfp8"
    assert sum(online["kernels"].values()) == 21
    assert 0 < online["metrics"]["kl_mean"]["value"] < 0.5
    ours, theirs = (d["metrics"]["kl_mean"]["value"] for d in (run.document, online))
    assert online["less"]["value"] == pytest.approx(theirs - ours, rel=1e-4)
    assert online["of"] == "kl"
    assert online["offline"] == ("better" if online["less"]["interval"][0] > 0 else "undecided")
    for file in files:
        text = file.read_text()
        assert "Against vLLM" in text
        assert "he checkpoint is" in text or "he checkpoint cannot" in text
    assert f"| {online['perplexity']:.4g} |" in files[0].read_text()


def test_an_interval_around_nothing_decides_nothing() -> None:
    assert _outcome(Measured(0.1, (0.05, 0.2), sampled=True)) == "better"
    assert _outcome(Measured(-0.1, (-0.2, -0.05), sampled=True)) == "worse"
    assert _outcome(Measured(0.1, (-0.05, 0.2), sampled=True)) == "undecided"
    assert _outcome(Measured(0.1, None, sampled=True)) == "undecided"


def test_methods_that_nobody_has_are_refused_before_anything_is_measured(
    sealed: Path, small_model: Path
) -> None:
    asked = ("validate", sealed, "--baseline", small_model, "--against-online")
    refused(quantkit(*asked, "fp9"), 1, "vLLM has no online method 'fp9'")
    refused(quantkit(*asked, "sglang:int4wo-128"), 1, "since April 2026")
    refused(quantkit(*asked, "int8_per_channel_weight_only"), 1, "rounds experts")
    if spec_named("vllm").python.is_file():
        other = quantkit(*asked, "sglang:fp8", "--engine", "vllm")
        refused(other, 1, "a method of sglang")
