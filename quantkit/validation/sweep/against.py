"""A sweep against an earlier one: which cells became worse beyond noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import InputError
from quantkit.recipe.documents import parse_json
from quantkit.validation.judge.bootstrap import Measured
from quantkit.validation.judge.metrics import OF_LOGITS, ROUTING
from quantkit.validation.judge.regression import compare, refuse_incomparable
from quantkit.validation.reports.earlier import checked_report
from quantkit.validation.sweep.leaderboard import KIND, SCHEMA_VERSION, Row

_SAMPLED = frozenset({*OF_LOGITS, ROUTING, "ppl_ratio", "mcq_drop", "canary_drift"}) - {"kl_max"}
_SPEEDS = frozenset({"prefill_speedup", "decode_speedup"})


@dataclass(frozen=True)
class Worse:
    """A metric of a cell that became worse."""

    cell: str
    metric: str
    old: float
    new: float


def read_earlier(path: Path) -> dict[str, Mapping[str, Any]]:
    """Cell → what it is compared with, of an earlier leaderboard.json. Raises InputError for a file
    that is none."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        if document["kind"] != KIND or document["schema_version"] != SCHEMA_VERSION:
            raise ValueError("it is no leaderboard.json of this version")
        found = {
            f"{cell['model']}: {cell['recipe']}": cell["compared"] for cell in document["cells"]
        }
        for report in found.values():
            if report is not None:
                checked_report(report, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--against {path} cannot be read: {error}.",
            hint="quantkit sweep FILE --out DIR  # writes DIR/leaderboard.json",
            code="sweep.bad_earlier",
        ) from error
    return {key: report for key, report in found.items() if report is not None}


def compared(
    rows: Sequence[Row], earlier: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[Worse, ...], tuple[str, ...]]:
    """What became worse, and notes on cells that cannot be compared. A cell that failed and had a
    result before is worse in its status."""
    worse: list[Worse] = []
    notes = []
    for row in rows:
        old = earlier.get(row.key)
        if old is None:
            notes.append(f"{row.key} is new: the earlier sweep has no result of it")
            continue
        if row.compared is None:
            worse.append(Worse(row.key, "result", 1.0, 0.0))
            continue
        try:
            refuse_incomparable(row.compared, old)
        except InputError as error:
            notes.append(f"{row.key} is not compared: {error.message}")
            continue
        worse += [
            Worse(row.key, change.metric, change.old, change.new)
            for change in compare(_metrics(row.compared), row.compared, old)
            if change.verdict == "worse" and change.metric not in _SPEEDS
        ]
    gone = earlier.keys() - {row.key for row in rows}
    notes += [f"{key} is in the earlier sweep only" for key in sorted(gone)]
    return tuple(worse), tuple(notes)


def _metrics(report: Mapping[str, Any]) -> dict[str, Measured]:
    """The metrics of a document as the judge takes them."""
    return {
        name: Measured(
            one["value"],
            tuple(one["interval"]) if one["interval"] else None,
            name in _SAMPLED,
            one.get("why", ""),
        )
        for name, one in report["metrics"].items()
    }
