"""The matrix of families × methods in the docs is made by its script, and nothing in it failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from quantkit.recipe.load import recipe_files
from tests.support.mixtures import MIXTURES
from tests.support.tokenized_towers import FAMILIES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "families.py"
MARK = "<!-- families.py -->\n"
PAGES: dict[str, Iterable[str]] = {"families.md": MIXTURES, "towers.md": FAMILIES}


def rows_of(page: str) -> list[str]:
    """The lines of a page's table."""
    _, _, table = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(MARK)
    return [line for line in table.splitlines() if line.startswith("|")]


METHODS = rows_of("families.md")[0].split("`")[1::2]


def script(*args: str | Path) -> None:
    """Run the script to its end."""
    subprocess.run(
        [sys.executable, SCRIPT, *args], check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_docs_have_every_family(page: str) -> None:
    head, *rows = rows_of(page)
    methods = head.split("`")[1::2]
    assert len(methods) > 1
    assert set(methods) <= set(recipe_files())
    assert {row.split("`")[1] for row in rows if "`" in row} == set(PAGES[page])
    assert not any("failed" in row or "|  |" in row for row in rows)


@pytest.mark.library
def test_the_script_makes_the_table_of_its_cells(tmp_path: Path) -> None:
    script(tmp_path, "--families", "granitemoe,llama4_text", "--methods", "modelopt_fp8")
    page = tmp_path / "page.md"
    page.write_text(f"# Kept\n{MARK}Replaced", encoding="utf-8")
    script(tmp_path, "--table", page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Kept\n{MARK}")
    assert "Replaced" not in text
    assert "| `granitemoe` | yes |" in text
    assert "| `llama4_text` | routed 1 |" in text
    assert "1. nvidia-modelopt cannot bring every token to every expert" in text


@pytest.mark.slow
@pytest.mark.library
@pytest.mark.parametrize("method", METHODS)
def test_no_family_fails(method: str, tmp_path: Path) -> None:
    script(tmp_path, "--methods", method)
    rows = json.loads((tmp_path / "families.json").read_text(encoding="utf-8"))
    assert rows.keys() == MIXTURES.keys()
    cells = {family: row[method] for family, row in rows.items()}
    assert not {family: cell for family, cell in cells.items() if cell["outcome"] == "failed"}
