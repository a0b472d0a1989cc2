"""The leaderboard of a sweep: one document; Markdown, CSV and a page are made from it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.checkpoint.paths import write_whole
from quantkit.errors import InputError
from quantkit.validation.reports.markdown import number, table
from quantkit.validation.sweep.cell import REPORT
from quantkit.validation.sweep.file import Cell

SCHEMA_VERSION = 1
KIND = "quantkit.sweep"
NAME = "leaderboard"
COMPARED = ("kind", "schema_version", "checkpoint", "baseline", "text", "engine", "metrics",
            "windows", "right")  # fmt: skip
"""What of a cell's report a later sweep is compared with."""


@dataclass(frozen=True)
class Row:
    """One cell with what came of it; `share` is the size of its weights over the baseline's,
    `report` the path of its page from the leaderboard, `compared` what `--against` needs."""

    model: str
    recipe: str
    digest: str
    status: str
    share: float | None = None
    bytes: int | None = None
    bits_per_weight: float | None = None
    kl: float | None = None
    perplexity_ratio: float | None = None
    top1_agreement: float | None = None
    facts_lost: float | None = None
    decode_speedup: float | None = None
    decode_tokens_s: float | None = None
    failed_gates: list[str] = field(default_factory=list)
    error: str = ""
    report: str = ""
    compared: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """What it is known by in an earlier sweep."""
        return f"{self.model}: {self.recipe}"

    @classmethod
    def of(cls, cell: Cell, found: Mapping[str, Any], folder: Path) -> Row:
        """The row of a cell's record."""
        if found.get("status") not in ("ok", "gate failed"):
            error = found.get("error") or {"message": "it did not run", "code": ""}
            told = f"{error['message']} ({error['code']})"
            return cls(cell.name, cell.recipe, cell.digest, "failed", error=told)
        metrics = found["metrics"]
        whole = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return cls(
            model=cell.name,
            recipe=cell.recipe,
            digest=cell.digest,
            status=found["status"],
            share=found["weight_bytes"] / found["baseline_bytes"],
            bytes=found["weight_bytes"],
            bits_per_weight=found["bits_per_weight"],
            kl=metrics.get("kl_mean"),
            perplexity_ratio=metrics.get("ppl_ratio"),
            top1_agreement=metrics.get("top1_agreement"),
            facts_lost=metrics.get("mcq_drop"),
            decode_speedup=metrics.get("decode_speedup"),
            decode_tokens_s=found["rates"].get("decode"),
            failed_gates=found["failed_gates"],
            report=f"cells/{cell.digest}/report.html",
            compared={key: whole[key] for key in COMPARED},
        )


def document(rows: Sequence[Row], worse: Iterable[Any], notes: Iterable[str]) -> dict[str, Any]:
    """The document: plain JSON values, the cells with the least KL first in each model."""
    order = list(dict.fromkeys(row.model for row in rows))
    ranked = sorted(
        rows, key=lambda row: (order.index(row.model), inf if row.kl is None else row.kl)
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "quantkit_version": __version__,
        "cells": [asdict(row) for row in ranked],
        "worse": [asdict(one) for one in worse],
        "notes": list(notes),
    }


COLUMNS = (
    ("model", "model"), ("recipe", "recipe"), ("status", "status"), ("kl", "KL"),
    ("share", "size"), ("bits_per_weight", "bits a weight"), ("perplexity_ratio", "perplexity ×"),
    ("top1_agreement", "same token"), ("facts_lost", "facts lost"),
    ("decode_speedup", "decode ×"), ("decode_tokens_s", "tokens/s"),
)  # fmt: skip
"""Field and title of every column."""


def cell_text(field_name: str, value: Any) -> str:
    """A value as a table shows it."""
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:.1%}" if field_name in ("share", "top1_agreement", "facts_lost") else (
        number(value)
    )  # fmt: skip


def as_markdown(found: Mapping[str, Any]) -> str:
    """The table, for a pull request or a job summary."""
    cells = found["cells"]
    lines = ["# Leaderboard", ""]
    lines += table(
        [title for _, title in COLUMNS],
        [[cell_text(name, cell[name]) for name, _ in COLUMNS] for cell in cells],
    )
    if found["worse"]:
        lines += ["", "## Worse than the earlier sweep", ""]
        lines += table(["cell", "metric", "before", "now"], [
            (one["cell"], one["metric"], number(one["old"]), number(one["new"]))
            for one in found["worse"]
        ])  # fmt: skip
    lines += ["", *(f"- {cell['model']}: {cell['recipe']}: {cell['error']}"
                    for cell in cells if cell["error"])]  # fmt: skip
    lines += [f"- {note}" for note in found["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def as_csv(found: Mapping[str, Any]) -> str:
    """The table as comma-separated values, numbers in full."""
    out = io.StringIO()
    names = [name for name, _ in COLUMNS] + ["bytes", "digest", "error"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([["" if cell[name] is None else cell[name] for name in names]
                      for cell in found["cells"]])  # fmt: skip
    return out.getvalue()


def write_all(found: Mapping[str, Any], out: Path) -> None:
    """leaderboard.json, .md, .csv and .html in the folder; each is replaced at once. Raises
    InputError where one cannot be written."""
    from quantkit.validation.sweep.page import as_html

    texts = {
        ".json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        ".md": as_markdown(found),
        ".csv": as_csv(found),
        ".html": as_html(found),
    }
    for suffix, text in texts.items():
        file = out / f"{NAME}{suffix}"
        write_whole(file, text.encode())
        if not file.is_file() or file.read_bytes() != text.encode():
            raise InputError(
                f"{file} cannot be written.",
                hint="free some space, then --resume: what is done stays",
                code="sweep.unwritable",
            )
