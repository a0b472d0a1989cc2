"""One cell: quantize, verify, validate, and a record of it. Also the process that does that.

Everything lies in a folder of the cell: `checkpoint/`, `report.json`, `report.html`, `log.txt`, and
at the end `result.json`, which is written at once: a kill at any moment leaves a cell that is whole
or one that is begun again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.backends.child_process import Child, log_text
from quantkit.checkpoint.whole_files import read_record, remove, write_record
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.validation.reports.report import Report

RESULT, REPORT, CHECKPOINT, LOG, JOB = (
    "result.json", "report.json", "checkpoint", "log.txt", "job.json",
)  # fmt: skip


@dataclass(frozen=True)
class CellJob:
    """What the process of a cell is told; `folder` is the cell's."""

    folder: str
    model: str
    method: str
    sets: list[str]
    samples: int
    data: str | None = None
    tasks: list[str] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)
    throughput: bool = True
    broken_baseline: bool = False
    device: str = "auto"


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a cell that ended well, whatever its gates said; None of any other."""
    found = read_record(folder / RESULT)
    return found if found and found.get("status") in ("ok", "gate failed") else None


def run_cell(
    job: CellJob, started: Callable[[Child], object] = lambda _child: None
) -> dict[str, Any]:
    """Run a cell in a process of its own, which `started` is given: its record, which is also kept.
    Never raises for what goes wrong in it."""
    folder = Path(job.folder)
    if found := finished(folder):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        RESULT,
        REPORT,
        "report.html",
        CHECKPOINT,
        f"{CHECKPOINT}.partial",
        f"{CHECKPOINT}.search",
        f"{CHECKPOINT}.recipe.yaml",
        f"{CHECKPOINT}.search.json",
    ):
        if (folder / name).exists():
            remove(folder / name)
    (folder / JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "quantkit.validation.sweep.cell", str(folder / JOB)]
    with (folder / LOG).open("wb") as log, Child(command, log=log) as child:
        started(child)
        ending = child.ending()
    found = read_record(folder / RESULT)
    if found is None:
        said = f"killed by {ending.killer}" if ending.killer else f"exit status {ending.status}"
        lines = log_text(folder / LOG).strip().splitlines()
        found = _failed("sweep.cell_lost", f"the process of the cell ended ({said})"
                        + (f": {lines[-1][:300]}" if lines else ""), "")  # fmt: skip
        write_record(folder / RESULT, found)
    return found


def _failed(code: str, message: str, hint: str) -> dict[str, Any]:
    return {"status": "failed", "error": {"code": code, "message": message, "hint": hint}}


class _Log:
    """A reporter that writes lines."""

    def stage(self, name: str, total: int = 0, unit: str = "steps") -> None:  # noqa: ARG002
        sys.stderr.write(f"{name} …\n")

    def advance(self, done: int) -> None: ...

    def note(self, text: str) -> None:
        sys.stderr.write(f"note: {text}\n")


def _work(job: CellJob) -> dict[str, Any]:
    from quantkit.pipeline.quantize import quantize
    from quantkit.pipeline.request import Request, chosen_recipe
    from quantkit.validation.reports.record import record
    from quantkit.validation.reports.write import write_reports
    from quantkit.validation.run import ValidateRequest, validate
    from quantkit.validation.search.resolve import searched_recipe
    from quantkit.validation.sweep.file import AUTO

    folder, ui, start = Path(job.folder), _Log(), time.monotonic()
    out = folder / CHECKPOINT
    method, sets = job.method, job.sets
    if method == AUTO:
        method, sets = str(searched_recipe(job.model, out, sets, ui, device=job.device)), []
    recipe = chosen_recipe(method, "", "", sets)
    outcome = quantize(Request(job.model, recipe, out, device=job.device), ui)
    made = time.monotonic() - start
    report = validate(
        ValidateRequest(
            path=out,
            baseline=job.model,
            device=job.device,
            data=Path(job.data) if job.data else None,
            samples=job.samples,
            tasks=tuple(job.tasks),
            gates=tuple(job.gates),
            throughput=job.throughput,
            broken_baseline=job.broken_baseline,
        ),
        ui,
    )
    document = report.to_json()
    record(out, document)
    write_reports(document, [folder / REPORT, folder / "report.html"])
    return {
        "status": "ok" if report.ok else "gate failed",
        "bits_per_weight": outcome.provenance.results.bits_per_weight,
        "weight_bytes": report.checkpoint["weight_bytes"],
        "baseline_bytes": report.baseline["weight_bytes"],
        "metrics": {name: measured.value for name, measured in report.metrics.items()},
        "failed_gates": [gate.metric for gate in report.gates if not gate.held],
        "rates": _rates(report),
        "seconds": {"quantize": round(made, 2), "all": round(time.monotonic() - start, 2)},
    }


def _rates(report: Report) -> dict[str, float]:
    """Tokens a second at the smallest batch, where they were measured."""
    held = report.throughput.quantized
    if held is None:
        return {}
    row = min(held.rows, key=lambda one: one.batch)
    return {"decode": row.decode_tokens_s.median, "prefill": row.prefill_tokens_s.median}


def main() -> None:
    """`python -m quantkit.validation.sweep.cell JOB.json`: exit 0 when a record was written."""
    from quantkit.backends.process.worker import die_with_parent

    die_with_parent()
    job = CellJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    folder = Path(job.folder)
    try:
        found = _work(job)
    except QuantkitError as error:
        found = _failed(error.code, error.message, error.hint)
    except Exception as error:
        import traceback

        traceback.print_exc()
        said = " ".join(str(error).split())[:300]
        found = _failed("internal.unexpected", f"{type(error).__name__}: {said}", "")
    if found["status"] == "failed":
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    write_record(folder / RESULT, found)


if __name__ == "__main__":
    main()
