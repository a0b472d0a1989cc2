"""Reports as files: the suffix of a path says which kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import InputError
from quantkit.validation.reports.junit import as_junit
from quantkit.validation.reports.markdown import as_markdown

Document = Mapping[str, Any]


def as_json(document: Document) -> str:
    """The document as indented JSON."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _as_html(document: Document) -> str:
    from quantkit.validation.reports.html import as_html

    return as_html(document)


Writers = Mapping[str, Callable[[Document], str]]
"""Suffix → what makes the text of a file that ends so."""

WRITERS: Writers = {
    ".json": as_json,
    ".md": as_markdown,
    ".html": _as_html,
    ".xml": as_junit,
}


def check_reports(paths: Sequence[Path], writers: Writers = WRITERS) -> None:
    """Refuse, before the work, a report that could not be written after it."""
    for path in paths:
        if path.suffix not in writers:
            raise InputError(
                f"--report {path}: there is no report of the kind {path.suffix or path.name}.",
                hint=f"end it in {', '.join(writers)}",
                code="validate.report_kind",
            )
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise InputError(
                f"--report {path} cannot be written: "
                + ("it is a directory." if path.is_dir() else f"{path.parent} does not exist."),
                hint="name a file in a directory that exists",
                code="validate.report_unwritable",
            )
        _probe(path)
        if path.suffix == ".html":
            from quantkit.validation.reports.html import require_matplotlib

            require_matplotlib()


def _probe(path: Path) -> None:
    """InputError where the file cannot be written; nothing is left of the attempt."""
    try:
        if path.exists():
            path.open("ab").close()
        else:
            path.touch()
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"--report {path} cannot be written: {error.strerror or error}.",
        hint="name a file in a directory that can be written to, on a disk with room",
        code="validate.report_unwritable",
    )


def write_reports(document: Document, paths: Sequence[Path], writers: Writers = WRITERS) -> None:
    """Write every report, JSON first: it holds what the others are made from. Raises InputError for
    one that cannot be written."""
    for path in sorted(paths, key=lambda path: path.suffix != ".json"):
        text = writers[path.suffix](document)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error
