"""The leaderboard in a real browser: light and dark, on a desk and on a phone, and sorted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantkit.validation.sweep.leaderboard import Row, document
from quantkit.validation.sweep.page import as_html
from tests.sweep.test_leaderboard import FAILED, row

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"
)
LONG = "a_very_long_recipe_name_without_any_space_" * 4
OTHER = "another_model_with_a_longer_name"
ROWS: tuple[Row, ...] = (
    row("eight", 0.01, 0.55), row("four", 0.1, 0.3), row(LONG, 0.03, 0.4), FAILED,
    row("eight", 0.02, 0.5, OTHER), row("four", 0.3, 0.28, OTHER),
)  # fmt: skip
PROBE = """
<script>
  const head = heads.find(h => h.textContent.startsWith("KL"));
  const column = heads.indexOf(head);
  const order = () => [...body.rows].map(r => r.cells[column].dataset.value);
  head.firstChild.click(); const up = order();
  head.firstChild.click(); const down = order();
  const root = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest("svg") &&
    !e.closest(".wide") && e.getBoundingClientRect().right > root.clientWidth + 1);
  const paint = e => getComputedStyle(e);
  const board = document.querySelector(".wide");
  parent.postMessage(JSON.stringify({
    up, down, sort: head.getAttribute("aria-sort"), width: root.clientWidth,
    kl: head.getBoundingClientRect().right, hidden: board.scrollWidth - board.clientWidth,
    overflow: root.scrollWidth - root.clientWidth, wide: wide.map(e => e.tagName),
    pictures: [...document.querySelectorAll("svg")].map(s => s.clientHeight),
    page: paint(document.body).backgroundColor, ink: paint(document.body).color,
    text: paint(document.querySelector("svg text")).fill,
  }), "*");
</script>
"""
FRAME = """<!doctype html><meta name="color-scheme" content="light dark">
<script>onmessage = told => { document.title = told.data; }</script>
<iframe src="leaderboard.html" style="border: 0; height: 3000px; width: %dpx"></iframe>
"""
"""A window is never narrower than 500 pixels; a frame in it is."""


def looked_at(tmp_path: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What the page measures of itself in a frame of that width."""
    page = as_html(document(ROWS, (), [LONG]))
    (tmp_path / "leaderboard.html").write_text(page.replace("</body>", PROBE + "</body>"))
    file = tmp_path / "frame.html"
    file.write_text(FRAME % width)
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--window-size=1200,1600", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    found: dict[str, Any] = json.loads(title.group(1))
    return found


def lightness(color: str) -> float:
    """Of rgb(r, g, b), from 0 to 1."""
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 765


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1100, 390])
def test_the_page_looks_right(width: int, dark: bool, tmp_path: Path) -> None:
    seen = looked_at(tmp_path, width, dark=dark)
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["wide"] == []
    assert seen["kl"] < width
    assert seen["hidden"] == 0 or width < 1000
    assert len(seen["pictures"]) == 2
    assert all(height > 100 for height in seen["pictures"])
    page, ink, text = (lightness(seen[name]) for name in ("page", "ink", "text"))
    assert (page < 0.2) if dark else (page > 0.95)
    assert abs(page - ink) > 0.6
    assert abs(page - text) > 0.3
    values = [float(one) for one in seen["up"] if one]
    assert values == sorted(values)
    assert [float(one) for one in seen["down"] if one] == values[::-1]
    assert seen["sort"] == "descending"
