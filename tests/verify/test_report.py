"""The report itself: what it counts, its JSON, and the memory that a verification takes."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf, nan
from pathlib import Path

import pytest

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.verification import verify
from quantkit.verification.findings import MOST_DB, decibels
from tests.support.cli import quantkit
from tests.support.damage import DOWN, patch
from tests.support.rtn import rtn

pytestmark = pytest.mark.broad

PEAK = """
import resource, sys
from pathlib import Path
from quantkit.verification import verify
report = verify(Path(sys.argv[1]), Path(sys.argv[2]))
assert report.ok, report.errors
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def fp8(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(small_model, tmp_path_factory.mktemp("report") / "fp8", SCHEMES["fp8_dynamic"])


def test_the_report_counts_and_orders(fp8: Path, small_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(fp8, small_model, progress=lambda done, total: seen.append((done, total)))
    assert report.format == "compressed-tensors"
    assert dict(report.ledger) == {"quantized": 21, "kept": 8}
    assert report.modules_quantized == 21
    assert report.tensors_checked == 50
    measured = [layer.sqnr_db for layer in report.layers]
    assert measured == sorted(measured)
    assert 31 < measured[0] < 32
    assert seen == [(n, 21) for n in range(1, 22)]


def test_without_a_source_nothing_is_measured(fp8: Path) -> None:
    report = verify(fp8)
    assert report.layers == []
    assert dict(report.ledger) == {"quantized": 42, "kept": 8}


def test_the_command_prints_the_report_as_json(
    fp8: Path, small_model: Path, tmp_path: Path
) -> None:
    good = quantkit("verify", fp8, "--source", small_model, "--json")
    assert good.code == 0, good.err
    assert good.document["schema_version"] == 1
    assert good.document["ok"] is True
    assert len(good.document["layers"]) == 21
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(fp8, broken)
    patch(broken, f"{DOWN}.weight_scale", lambda t: t * 1.5)
    bad = quantkit("verify", broken, "--source", small_model, "--json")
    assert bad.code == 4
    (finding,) = [f for f in bad.document["findings"] if f["severity"] == "error"]
    assert finding["code"] == "sqnr.below_floor"
    assert finding["where"] == DOWN
    assert "1.50 ×" in finding["message"]
    assert bad.document["layers"][0]["module"] == DOWN
    assert json.loads(bad.out) == bad.document


def test_memory_does_not_grow_with_the_model(
    demo_model: Path, fp8: Path, small_model: Path, tmp_path: Path
) -> None:
    full = rtn(demo_model, tmp_path / "full", SCHEMES["fp8_dynamic"])
    peaks = [
        int(subprocess.run(
            [sys.executable, "-c", PEAK, str(path), str(source)],
            check=True, capture_output=True, text=True,
        ).stdout)
        for path, source in ((fp8, small_model), (full, demo_model))
    ]  # fmt: skip
    assert peaks[1] - peaks[0] < 40_000, "KiB; the larger model has 290 MB more to read"


def test_importing_verify_loads_no_torch() -> None:
    code = (
        "import sys, quantkit.verification; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("signal", "noise", "wanted"),
    [(100.0, 1.0, 20.0), (1.0, 0.0, MOST_DB), (0.0, 1.0, -MOST_DB), (1.0, inf, -MOST_DB),
     (1.0, nan, -MOST_DB), (nan, 1.0, -MOST_DB), (1.0, 1e300, -MOST_DB)],
)  # fmt: skip
def test_decibels_are_always_a_number(signal: float, noise: float, wanted: float) -> None:
    assert decibels(signal, noise) == wanted
