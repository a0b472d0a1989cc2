"""A job keeps its schemes on the way through job.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from quantkit.backends.process.job import Job
from quantkit.checkpoint.schemes import SCHEMES, Scheme


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_schemes_come_back_as_they_were_written(scheme: Scheme, tmp_path: Path) -> None:
    other = scheme.with_weight(symmetric=not scheme.weight.symmetric)
    job = Job(
        task="quantize", backend="modelopt", adapter="a:run", method="m", model="/m", out="/o",
        scheme=scheme, layers={"a": scheme, "b": other, "c": scheme}, options={"format": "gptq"},
    )  # fmt: skip
    job.write(tmp_path / "job.json")
    found = Job.read(tmp_path / "job.json")
    assert found == job
    assert [hash(own) for own in found.layers.values()] == [
        hash(own) for own in job.layers.values()
    ]
    assert found.layers["a"].weight.bits == scheme.weight.bits


def test_a_state_of_unknown_origin_has_no_scheme(tmp_path: Path) -> None:
    job = Job(
        task="export", backend="modelopt", adapter="a:run", method="export", model="/m", out="/o",
        scheme=None, restore="/s.pth",
    )  # fmt: skip
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    assert Job.from_json(asdict(job)) == job
