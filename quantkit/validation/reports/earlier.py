"""An earlier JSON report read back, and checked: anything may be in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import InputError
from quantkit.recipe.documents import parse_json
from quantkit.validation.reports.report import KIND, SCHEMA_VERSION

_PARTS = ("checkpoint", "baseline", "text", "engine", "metrics", "windows", "right")


def read_report(path: Path) -> dict[str, Any]:
    """An earlier JSON report; InputError for a file that is none, or of another version."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_report(path, f"cannot be read: {error}") from error
    return checked_report(document, path)


def checked_report(document: Any, path: Path) -> dict[str, Any]:
    """A document as an earlier report; InputError, which names its file, for one that is none."""
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise _no_report(path, "is no report of quantkit validate")
    if document.get("schema_version") != SCHEMA_VERSION:
        version = document.get("schema_version")
        raise _no_report(path, f"has schema_version {version!r}; this quantkit reads 1")
    if fault := _fault(document):
        raise _no_report(path, f"is damaged: {fault}")
    return document


def _fault(document: dict[str, Any]) -> str:
    """What a comparison could not use, "" where it can use everything."""
    for part in _PARTS:
        if not isinstance(document.get(part), dict):
            return f"{part} is no object"
    for name, metric in document["metrics"].items():
        if not isinstance(metric, dict) or not _number(metric.get("value")):
            return f"metrics.{name} has no value that is a number or null"
        interval = metric.get("interval")
        pair = isinstance(interval, list) and len(interval) == 2
        if interval is not None and not (pair and all(map(_finite, interval))):
            return f"metrics.{name}.interval is no pair of numbers"
    for part in ("windows", "right"):
        for name, values in document[part].items():
            if values is not None and not (isinstance(values, list) and all(map(_number, values))):
                return f"{part}.{name} is no list of numbers"
    return ""


def _number(value: Any) -> bool:
    return value is None or _finite(value)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float)


def _no_report(path: Path, why: str) -> InputError:
    return InputError(
        f"The report {path} {why}.",
        hint="quantkit validate DIR --baseline MODEL --report report.json  # makes one",
        code="validate.bad_report",
    )
