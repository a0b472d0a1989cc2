"""The HTML report: self-contained, escaped, and looked at in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.validation.reports.html import as_html
from quantkit.validation.reports.plots import experts_figure, scatter_figure, svg
from tests.support.rtn import rtn
from tests.support.validating import measured
from tests.test_house import FLAGS, ROOT

pytestmark = pytest.mark.broad

pytest.importorskip("matplotlib", reason="HTML reports are optional: quantkit[report]")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LONG = "a_very_long_checkpoint_name_without_any_space_" * 4
PROBE = """
<script>
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    !e.closest("svg") && !e.closest(".wide") &&
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  document.title = JSON.stringify({
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    wide: wide.map(e => e.tagName),
    pictures: [...document.querySelectorAll("svg")].map(s => s.clientHeight > 100),
    badges: document.querySelectorAll(".badge").length,
  });
</script>
"""


@pytest.fixture(scope="module")
def document(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = rtn(small_model, tmp_path_factory.mktemp("html") / "w8a8", SCHEMES["w8a8_dynamic"])
    found = measured(out, small_model).to_json()
    rate = {"median": 100.0, "low": 90.0, "high": 130.0}
    row = {"prompt_tokens": 8, "new_tokens": 4, "prefill_tokens_s": rate, "decode_tokens_s": rate,
           "first_token_s": rate}  # fmt: skip
    side = {"load_seconds": 1.0, "memory_bytes": 10, "rows": [{"batch": 1, **row}]}
    return {**found, "throughput": {"baseline": side, "quantized": side}}


def test_page_needs_nothing_from_outside(document: dict[str, Any]) -> None:
    page = as_html(document)
    assert page.count("<svg") == 3
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link|<img|@import|url\((?!#)", without_names)


def test_pictures_of_what_was_not_measured_are_left_out(document: dict[str, Any]) -> None:
    absent = {"baseline": None, "quantized": None}
    page = as_html({**document, "throughput": absent, "kl_histogram": None, "layers": []})
    assert "<svg" not in page


def test_the_experts_of_a_mixture_are_drawn(document: dict[str, Any]) -> None:
    blocks = {f"model.layers.{layer}.mlp.experts": [layer, 3, 12, 9] for layer in range(3)}
    experts = {
        "calibrated": "routed", "floor": 1, "min": 0, "median": 6.0, "decided": "rtn",
        "routed": blocks, "seen": blocks, "under_floor": {"model.layers.0.mlp.experts.0": 0},
    }  # fmt: skip
    page = as_html({**document, "checkpoint": {**document["checkpoint"], "experts": experts}})
    assert "Calibration of the experts" in page
    assert page.count("<svg") == as_html(document).count("<svg") + 1
    assert "Calibration of the experts" not in as_html(document)


def test_experts_are_drawn_by_depth_and_those_under_the_floor_crossed() -> None:
    names = sorted(f"model.layers.{layer}.mlp.experts" for layer in range(1, 12))  # 1, 10, 11, 2 …
    routed = {name: [int(name.split(".")[2]), 20] for name in names}
    experts = {"floor": 2, "routed": routed, "seen": routed}
    figure = experts_figure({"checkpoint": {"experts": experts}})
    assert figure is not None
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(n) for n in range(1, 12)]
    drawn = axes.images[0].get_array()
    assert drawn is not None
    assert drawn.tolist() == [list(range(1, 12)), [20] * 11]
    assert axes.collections[0].get_offsets().tolist() == [[0, 0]]  # type: ignore[union-attr]


def test_what_models_say_is_escaped(document: dict[str, Any]) -> None:
    changed = deepcopy(document)
    changed["canary"][0]["quantized"] = "<script>alert(1)</script>"
    assert "<script" not in as_html(changed)


def test_same_report_gives_the_same_page(document: dict[str, Any]) -> None:
    assert as_html(document) == as_html(document)


def test_scatter_names_every_report(document: dict[str, Any]) -> None:
    other = deepcopy(document)
    other["checkpoint"]["weight_bytes"] //= 2
    assert svg(scatter_figure([document, other])).startswith("<svg")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("width", [1100, 500])
def test_nothing_overflows_in_a_browser(
    width: int, document: dict[str, Any], tmp_path: Path
) -> None:
    changed = deepcopy(document)
    changed["checkpoint"]["name"] = LONG
    changed["canary"][0]["quantized"] = LONG
    file = tmp_path / "report.html"
    file.write_text(as_html(changed).replace("</body>", PROBE + "</body>"))
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},1500", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(title.group(1))
    assert seen["overflow"] <= 0
    assert seen["wide"] == []
    assert seen["pictures"] == [True] * 3
    assert seen["badges"] == len(document["gates"]) + 1


def test_workflow_uses_commands_that_exist() -> None:
    file = ROOT / "examples" / "github-actions" / "quantkit.yml"
    steps = yaml.safe_load(file.read_text())["jobs"]["validate"]["steps"]
    script = "\n".join(step.get("run", "") for step in steps)
    assert "quantkit validate" in script
    for command in ("quantize", "validate"):
        lines = [line for line in script.splitlines() if f"quantkit {command}" in line]
        assert lines
        for line in lines:
            assert set(re.findall(r"--[\w-]+", line)) <= FLAGS[command]
