"""`quantkit validate` as a whole, on real checkpoints of three layers: good, damaged, broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from huggingface_hub import ModelCard

from quantkit.backends.environments.managed import spec_named
from quantkit.errors import BackendError
from quantkit.validation.ask.cachefile import BaselineCache
from quantkit.validation.run import ValidateRequest, validate
from quantkit.validation.subjects.engines import engine_build
from quantkit.verification import verify
from tests.support.cli import Run, quantkit
from tests.support.damage import DOWN, patching
from tests.support.validating import (
    SOBER,
    SWAPS,
    Quiet,
    damaged,
    measured,
    scaled,
    verdicts,
    zero_points,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def run(
    sealed: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Path]:
    """One whole run of the command, throughput included, and where its reports are."""
    reports = tmp_path_factory.mktemp("reports")
    asked = [word for end in ("json", "md", "xml") for word in ("--report", reports / f"r.{end}")]
    done = quantkit(
        "validate", sealed, "--baseline", small_model, "--samples", "8", "--gate", SOBER,
        "--gate", "memory_ratio<=0.99", "--broken-baseline", *asked, "--json",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    return done, reports


def test_document_says_what_was_measured(run: tuple[Run, Path]) -> None:
    document = run[0].document
    assert document["schema_version"] == 1
    assert document["ok"]
    assert document["engine"]["kernels"] == {"int8_cpu": 21} or document["engine"]["kernels"]
    assert not document["engine"]["weights_only"]
    assert document["text"]["seen_by_calibration"] == 0.0
    found = {gate["metric"]: gate["verdict"] for gate in document["gates"]}
    assert found.pop("mcq_drop") == "undecided"  # 96 answers cannot tell 3 % from nothing
    assert found.pop("exercise_drop") == "undecided"  # and 16 not 10 %
    assert set(found.values()) == {"pass"}
    assert document["undecided"] == 2
    assert document["values"]["exercises"]["quantized"].keys() == {
        "arithmetic", "copying", "counting", "json",
    }  # fmt: skip
    assert {"metric", "limit", "value", "interval", "verdict"} <= document["gates"][0].keys()
    assert 0 < document["metrics"]["kl_mean"]["value"] < 0.05
    assert len(document["windows"]["nll"]) == 8
    assert sum(document["kl_histogram"]["counts"]) == 8 * 511
    assert len(document["canary"]) == 8
    for side in document["throughput"].values():
        assert [row["batch"] for row in side["rows"]] == [1, 8]


def test_reports_say_the_same(run: tuple[Run, Path]) -> None:
    done, reports = run
    assert json.loads((reports / "r.json").read_text()) == done.document
    markdown = (reports / "r.md").read_text()
    assert markdown.startswith("# w8a8: no gate failed, 2 undecided")
    assert "| kl_mean | <=0.05 |" in markdown
    suites = ET.fromstring((reports / "r.xml").read_text())
    cases = suites.findall(".//testcase")
    assert len(cases) == len(done.document["gates"])
    assert not suites.findall(".//failure")
    assert [case.get("name") for case in cases if case.find("skipped") is not None] == [
        "mcq_drop<=0.03",
        "exercise_drop<=0.1",
    ]


def test_numbers_are_in_the_checkpoint_which_still_verifies(
    run: tuple[Run, Path], sealed: Path, small_model: Path
) -> None:
    found = json.loads((sealed / "quantkit.json").read_text())["results"]["validation"]
    assert found["metrics"] == run[0].document["metrics"]
    card = (sealed / "README.md").read_text()
    assert "KL divergence from the baseline, mean" in card
    assert "| of what rounding to nearest loses, recovered (KL) | 0% |" in card
    assert "were not measured" not in card
    assert "no gate failed, 2 undecided." in card
    assert card.count("## Measured") == card.count("## How it was made") == 1
    results = {one.metric_type: one.metric_value for one in ModelCard(card).data["eval_results"]}
    assert results["perplexity"] == round(found["values"]["perplexity"]["quantized"], 4)
    assert results.keys() == {"perplexity", "kl_divergence", "accuracy"}
    assert verify(sealed, small_model).ok


def test_baseline_is_not_run_twice(sealed: Path, small_model: Path, run: tuple[Run, Path]) -> None:
    ui = Quiet()
    request = ValidateRequest(
        sealed, str(small_model), samples=8, throughput=False, gates=(SOBER,), broken_baseline=True
    )
    report = validate(request, ui)
    assert not [stage for stage in ui.stages if "baseline:" in stage]
    assert not [stage for stage in ui.stages if "rounded" in stage]
    assert "6 measurements of the baseline came from the cache" in report.notes
    again = report.to_json()
    assert again["metrics"]["ppl_ratio"] == run[0].document["metrics"]["ppl_ratio"]


def test_a_damaged_cache_is_measured_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    cache = BaselineCache("model")
    assert cache.value("canary", "q", lambda: [1]) == [1]
    (file,) = cache.folder.iterdir()
    file.write_text("{")
    assert cache.value("canary", "q", lambda: [2]) == [2]
    assert cache.value("canary", "q", lambda: [3]) == [2]


def test_another_build_of_an_engine_has_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("quantkit.validation.subjects.engines.computing", lambda: "")
    assert engine_build("transformers") == ""
    for reason, build in {"not made": "", None: spec_named("vllm").path.name}.items():
        monkeypatch.setattr("quantkit.runtime.vllm_ops.cpu.missing", lambda why=reason: why)
        assert engine_build("builtin") == build
    monkeypatch.setattr("quantkit.validation.subjects.engines.computing", lambda: "in float32")
    assert engine_build("builtin") == f"{spec_named('vllm').path.name} in float32"
    with pytest.raises(BackendError, match="not made yet"):
        engine_build("vllm")
    python = spec_named("vllm").python
    python.parent.mkdir(parents=True)
    python.touch()
    assert engine_build("vllm") == spec_named("vllm").path.name


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "scales × 1.5, 8 bits": ("8", scaled("weight_scale")),
    "scales × 1.5, 4 bits": ("4", scaled("weight_scale")),
    **{f"{what} swapped, 8 bits": ("8", swap) for what, swap in SWAPS.items()},
    **{f"{what} swapped, 4 bits": ("4", swap) for what, swap in SWAPS.items()},
    "zero points 16 off, 8 bits": ("8 asymmetric", zero_points(lambda z: z ^ 0x10101010)),
    "zero points 2 off, 4 bits": ("4 asymmetric", zero_points(lambda z: z ^ 0x22222222)),
}


SLOW_DAMAGES = {
    "gate and up swapped, 4 bits",
    "k and v swapped, 8 bits",
    "scales × 1.5, 4 bits",
    "zero points 2 off, 4 bits",
}
"""The same damage at the other width is looked at each time."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_DAMAGES else n for n in DAMAGES],
)
def test_damaged_copy_loads_and_fails_its_gates(
    name: str, checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    which, damage = DAMAGES[name]
    copy = damaged(checkpoints[which], tmp_path / "copy", damage)
    report = measured(copy, small_model)
    found = verdicts(report)
    assert not report.ok
    assert found["weight_sqnr_margin"] == "fail"
    assert report.layers[0].module.split(".")[2] == "1"


@pytest.mark.parametrize(
    "which", ["8", "4", *(pytest.param(f"{n} asymmetric", marks=pytest.mark.slow) for n in "84")]
)
def test_undamaged_copy_holds_its_gates(
    which: str, checkpoints: dict[str, Path], small_model: Path
) -> None:
    report = measured(checkpoints[which], small_model, "ppl_ratio<=inf", "mcq_drop<=1")
    assert report.ok, verdicts(report)


def test_weights_only_kernel_satisfies_no_gate_of_quantized_activations(
    checkpoints: dict[str, Path], small_model: Path
) -> None:
    report = measured(checkpoints["8"], small_model, kernel="dequantized")
    assert report.engine["weights_only"]
    assert verdicts(report)["ppl_ratio"] == "undecided"
    assert not report.ok


def test_a_layer_of_nothing_but_noise_is_reported(
    checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    """Sums of squares overflow: the SQNR of such a layer has no logarithm."""
    huge = patching(f"{DOWN}.weight_scale", lambda scale: torch.full_like(scale, 1e25))
    copy = damaged(checkpoints["8"], tmp_path / "copy", huge)
    reports = [tmp_path / f"r.{end}" for end in ("md", "xml", "html", "json")]
    done = quantkit(
        "validate", copy, "--baseline", small_model, "--samples", "8", "--no-throughput",
        "--broken-baseline", *(word for report in reports for word in ("--report", report)),
    )  # fmt: skip
    assert done.code == 4, done.out + done.err
    document = json.loads(reports[-1].read_text())
    assert document["layers"][0] == {
        "module": DOWN, "scheme": "w8a8_dynamic", "sqnr_db": -200.0, "floor_db": 16.0,
    }  # fmt: skip
    assert f"`{DOWN}` | w8a8_dynamic | -200.0" in reports[0].read_text()
    assert all(report.stat().st_size for report in reports)
