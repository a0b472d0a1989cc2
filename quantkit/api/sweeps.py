"""The function that compares many recipes: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.api.given import check_count
from quantkit.api.progress import ProgressCallback, Told

if TYPE_CHECKING:
    from quantkit.validation.sweep.run import SweepReport


def sweep(
    file: str | Path,
    *,
    out: str | Path,
    resume: bool = False,
    against: str | Path | None = None,
    jobs: int = 1,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> SweepReport:
    """Quantize, verify and validate models × recipes × settings of a YAML file, and write one
    leaderboard (.html, .md, .json, .csv) into `out`.

    Cells are named by what decides their result, and one that has a result is not run again.
    resume: go on in an `out` that holds a sweep. against: the leaderboard.json of an earlier one.
    jobs: cells at a time on this machine; RAY_ADDRESS: on that cluster, which schedules them.

    A cell that fails is a row of the result (`SweepReport.failed`), as is one whose gate fails
    (`.ok`). Raises InputError before any work.
    """
    from quantkit.validation.sweep.run import SweepRequest
    from quantkit.validation.sweep.run import sweep as run

    check_count("--jobs", jobs)
    request = SweepRequest(
        Path(file), Path(out), resume, None if against is None else Path(against), jobs, device
    )
    return run(request, Told(progress))
