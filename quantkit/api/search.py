"""The functions that look for a recipe: analyze, and what `--method auto` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.api.given import check_count, listed
from quantkit.api.progress import ProgressCallback, Told
from quantkit.errors import InputError, ReportError

if TYPE_CHECKING:
    from quantkit.validation.search.analyze import Sensitivity

AUTO = "auto"
"""The method that is a search."""
SCHEMES = ("nvfp4", "fp8_dynamic", "w4a16")
"""What `analyze` looks at unless told otherwise."""
WINDOWS = 16
"""Windows of text that it reads unless told otherwise."""


def analyze(
    model: str | Path,
    *,
    schemes: str | Sequence[str] = SCHEMES,
    data: str | Path | None = None,
    samples: int = WINDOWS,
    engine: str = "vllm",
    device: str = "auto",
    reports: str | Path | Sequence[str | Path] = (),
    progress: ProgressCallback | None = None,
) -> Sensitivity:
    """Estimate what each scheme does to each group of layers that an engine fuses.

    schemes: names, or SCHEME:GROUP_SIZE. data: a text file instead of the held-out text; samples:
    windows of 512 tokens of it, which the whole costs (1.2 × schemes + 1) forward passes over.
    reports: files to write (.json, .html).

    Raises InputError before the work, and ReportError, which holds the result, when a file of
    `reports` could not be written at the end.
    """
    from quantkit.validation.reports.write import check_reports, write_reports
    from quantkit.validation.search.analyze import analyze as run
    from quantkit.validation.search.page import WRITERS

    files = [Path(file) for file in listed(reports)]
    check_reports(files, WRITERS)
    check_count("--samples", samples)
    names = [name.strip() for entry in listed(schemes) for name in str(entry).split(",") if name]
    found = run(
        str(model),
        names,
        Told(progress),
        engine=engine,
        data=None if data is None else Path(data),
        samples=samples,
        device=device,
    )
    try:
        write_reports(found.to_json(), files, WRITERS)
    except InputError as error:
        raise ReportError(error.message, hint=error.hint, code=error.code, result=found) from error
    return found
