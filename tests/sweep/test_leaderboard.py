"""The leaderboard's files, its fronts, and the comparison with an earlier sweep."""

from __future__ import annotations

import csv
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import InputError
from quantkit.validation.sweep.against import compared, read_earlier
from quantkit.validation.sweep.leaderboard import Row, document, write_all
from quantkit.validation.sweep.page import Point, pareto, round_ticks, scatter

WINDOWS = 12


def report(kl: float) -> dict[str, Any]:
    """What a cell's report holds of a comparison."""
    return {
        "kind": "quantkit.validation",
        "schema_version": 1,
        "checkpoint": {"recipe_digest": "r", "method": "m"},
        "baseline": {"fingerprint": "f"},
        "text": {"digest": "t"},
        "engine": {"name": "builtin", "kernel": "auto"},
        "metrics": {"kl_mean": {"value": kl, "interval": [kl * 0.9, kl * 1.1], "why": ""}},
        "windows": {"kl": [kl * (1 + 0.01 * number) for number in range(WINDOWS)]},
        "right": {"baseline": [], "quantized": []},
    }


def row(recipe: str, kl: float, share: float, model: str = "one") -> Row:
    return Row(
        model, recipe, recipe, "ok", share, int(share * 1000), 8 * share, kl, 1.01, 0.9, 0.0, 1.0,
        100 * share, report=f"cells/{recipe}/report.html", compared=report(kl),
    )  # fmt: skip


FAILED = Row("one", "broken <b>", "x", "failed", error="no module is left (plan.refused)")
ROWS = (row("eight", 0.01, 0.55), row("four", 0.1, 0.3), row("mixed", 0.03, 0.4),
        row("poor", 0.2, 0.5), FAILED, row("eight", 0.02, 0.5, "two"))  # fmt: skip


def test_every_file_has_every_cell_in_order(tmp_path: Path) -> None:
    write_all(document(ROWS, (), ["a note"]), tmp_path)
    data = json.loads((tmp_path / "leaderboard.json").read_text())
    order = [(cell["model"], cell["recipe"]) for cell in data["cells"]]
    assert order == [("one", "eight"), ("one", "mixed"), ("one", "four"), ("one", "poor"),
                     ("one", "broken <b>"), ("two", "eight")]  # fmt: skip
    with (tmp_path / "leaderboard.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert [(line["model"], line["recipe"]) for line in lines] == order
    assert [line["kl"] for line in lines] == ["0.01", "0.03", "0.1", "0.2", "", "0.02"]
    told = (tmp_path / "leaderboard.md").read_text()
    assert all(f"| {recipe} |" in told for _, recipe in order)
    assert "no module is left" in told


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_all(document(ROWS, (), []), tmp_path)
    page = (tmp_path / "leaderboard.html").read_text()
    assert not re.findall(r"(?:src=|https?://|@import|url\()", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 2
    assert page.count("<circle") == 10
    assert 'href="cells/mixed/report.html"' in page
    assert "broken &lt;b&gt;" in page
    assert "broken <b>" not in page


def test_the_front_holds_what_nothing_beats() -> None:
    points = [Point(1, 5, "a", 0), Point(2, 3, "b", 0), Point(3, 4, "c", 0), Point(4, 1, "d", 0)]
    assert [one.title for one in pareto(points, least=True)] == ["a", "b", "d"]
    assert [one.title for one in pareto(points, least=False)] == ["d"]
    assert scatter([], "x", least=True) == ""
    assert scatter(points[:1], "x", least=True).count("<circle") == 1


@pytest.mark.parametrize(("low", "high", "written"), [
    (0.26, 0.67, "0.3 0.4 0.5 0.6"), (27.0, 56.0, "30 35 40 45 50 55"),
    (0.998, 1.002, "0.998 0.999 1.000 1.001 1.002"), (7900.0, 28100.0, "10000 15000 20000 25000"),
])  # fmt: skip
def test_sizes_and_speeds_are_marked_at_round_numbers(
    low: float, high: float, written: str
) -> None:
    ticks = round_ticks(low, high)
    assert [text for _, text in ticks] == written.split()
    assert [value for value, _ in ticks] == pytest.approx([float(text) for _, text in ticks])
    assert low <= ticks[0][0] < ticks[-1][0] <= high


def earlier(tmp_path: Path, rows: tuple[Row, ...]) -> dict[str, Any]:
    (tmp_path / "old").mkdir()
    write_all(document(rows, (), []), tmp_path / "old")
    return dict(read_earlier(tmp_path / "old" / "leaderboard.json"))


def test_what_became_worse_beyond_noise_is_named(tmp_path: Path) -> None:
    old = earlier(tmp_path, ROWS)
    assert compared(ROWS, old) == ((), (f"{FAILED.key} is new: the earlier sweep has no result "
                                        "of it",))  # fmt: skip
    now = (row("eight", 0.05, 0.55), row("four", 0.1005, 0.3), row("fresh", 1.0, 0.3),
           Row("one", "mixed", "x", "failed", error="lost"), row("poor", 0.1, 0.5))  # fmt: skip
    worse, notes = compared(now, old)
    assert [(one.cell, one.metric) for one in worse] == [
        ("one: eight", "kl_mean"), ("one: mixed", "result"),
    ]  # fmt: skip
    assert any("fresh is new" in note for note in notes)
    assert any("two: eight is in the earlier sweep only" in note for note in notes)


def test_what_is_not_of_the_same_text_is_not_compared(tmp_path: Path) -> None:
    old = earlier(tmp_path, ROWS[:1])
    other = deepcopy(old)
    other[ROWS[0].key]["text"]["digest"] = "another"
    worse, notes = compared(ROWS[:1], other)
    assert worse == ()
    assert "another text" in notes[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "quantkit.validation"}',
    '{"kind": "quantkit.sweep", "schema_version": 1, "cells": [{"model": "a"}]}'])  # fmt: skip
def test_an_earlier_sweep_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_earlier(tmp_path / "old.json")
    assert caught.value.code == "sweep.bad_earlier"
