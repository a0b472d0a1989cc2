"""The parent's side of the worker: start it, follow it, and say clearly how it ended."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.backends.child_process import Child, Ending, log_text
from quantkit.backends.environments import install_command
from quantkit.backends.process import worker
from quantkit.backends.process.job import Job, Reporter, Result
from quantkit.backends.registry import backend_named
from quantkit.errors import BackendError, InputError, QuantkitError

LOG_LINES = 5
LOG_WIDTH = 300


def run_worker(
    job: Job, *, python: Path, log: Path, report: Reporter, work: Path | None = None
) -> Result:
    """Run `job` in a child process of the interpreter `python` and return what it did.

    The child and all that it starts are ended when this call ends for any reason, Ctrl-C included
    (`Child`); the kernel kills the child when this process dies. Its stdout and
    stderr go to the file `log` as they come, its progress to `report`. A half-written
    `job.checkpoint_save` is removed. Its temporary files lie in the folder `work`, where a kill of
    this process leaves them to whoever removes that.

    Raises InputError when the adapter blames the job, BackendError otherwise, with the code
    `worker.no_interpreter`, `.import_failed`, `.killed`, `.out_of_memory`, `.no_space`,
    `.bad_result`, `.failed` or the adapter's own.
    """
    with tempfile.TemporaryDirectory(prefix="quantkit-", dir=work) as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job.write(job_file)
        try:
            ending, told = _run(job_file, result_file, python, log, report)
            return _conclude(ending, told, job, python, log, result_file)
        finally:
            if job.checkpoint_save:
                Path(job.checkpoint_save + ".partial").unlink(missing_ok=True)


@dataclass
class _Told:
    """What the worker said on its way: the stages that it began, the failure that it announced."""

    stages: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None


def _run(
    job_file: Path, result_file: Path, python: Path, log: Path, report: Reporter
) -> tuple[Ending, _Told]:
    events, events_of_child = os.pipe()
    script = Path(worker.__file__).resolve()
    arguments = [str(python), str(script), str(job_file), str(result_file), str(events_of_child)]
    try:
        with _start(arguments, python, log, events_of_child, job_file.parent) as child:
            told = _Told()
            for event in child.events(events):
                _pass_on(event, told, report)
            return child.ending(), told
    finally:
        os.close(events)


def _start(arguments: list[str], python: Path, log: Path, events: int, folder: Path) -> Child:
    with log.open("ab") as handle:
        try:
            return Child(arguments, log=handle, descriptors=(events,), folder=folder)
        except OSError as error:
            raise BackendError(
                f"The worker cannot be started with {python}: {error.strerror}.",
                hint="name an interpreter with --python",
                code="worker.no_interpreter",
            ) from error


def _pass_on(event: dict[str, Any], told: _Told, report: Reporter) -> None:
    kind = event["event"]
    if kind == "stage":
        told.stages.append(event["name"])
        report.stage(event["name"], event["total"], event["unit"])
    elif kind == "advance":
        report.advance(event["done"])
    elif kind == "note":
        report.note(event["text"])
    elif kind == "error":
        told.error = event["error"]


def _conclude(
    ending: Ending, told: _Told, job: Job, python: Path, log: Path, result_file: Path
) -> Result:
    if ending.killer:
        raise _killed(ending, told, job, log)
    try:
        result = Result.read(result_file)
    except (OSError, ValueError, TypeError) as error:
        if told.error is None:
            raise _bad_result(
                job, log, f"left no readable result (exit status {ending.status}, {error})"
            ) from error
        result = Result(error=told.error)
    if result.error is not None:
        raise _failure(result.error, job, python, log)
    out = Path(job.out)
    if not result.ok or ending.status != 0:
        raise _bad_result(job, log, f"reports ok={result.ok} with exit status {ending.status}")
    if not out.is_dir() or not any(out.iterdir()):
        raise _bad_result(job, log, f"reports success, but {out} holds no files")
    return result


def _killed(ending: Ending, told: _Told, job: Job, log: Path) -> BackendError:
    where = f" in stage {told.stages[-1]}" if told.stages else ""
    if ending.out_of_memory:
        return _out_of_memory(
            f"The worker of {job.method} was killed{where} because the machine or its container "
            f"ran out of memory; it held {ending.peak_bytes / 1e9:.1f} GB.",
            job,
        )
    return BackendError(
        f"The worker of {job.method} was killed by {ending.killer}{where}.{_tail(log)}",
        hint=f"read {log}, then run the command again"
        + (" with --resume" if job.resume_folder else ""),
        code="worker.killed",
    )


def _out_of_memory(message: str, job: Job) -> BackendError:
    smaller = job.placement != "layerwise" and job.resume_folder and not job.checkpoint_save
    layerwise = smaller and "layerwise" in backend_named(job.backend).placements
    last = ("go on with --resume --set placement=layerwise" if layerwise
            else "use a machine with more memory")  # fmt: skip
    return BackendError(
        f"{message[:-1]} (placement={job.placement} on {', '.join(job.devices or [job.device])}).",
        hint=f"add --set calibration.batch_size=1, shorten calibration.sequence_length, or {last}",
        code="worker.out_of_memory",
    )


def _bad_result(job: Job, log: Path, what: str) -> BackendError:
    return BackendError(
        f"The worker of {job.method} {what}.{_tail(log)}",
        hint=f"read {log}; if the adapter {job.adapter} is a plugin, tell its makers",
        code="worker.bad_result",
    )


def _failure(error: dict[str, str], job: Job, python: Path, log: Path) -> QuantkitError:
    """The exception for a failure that the worker described itself."""
    sentence = " ".join(error["message"].split()).rstrip(".")
    library = f"{error['type']}: {sentence}" if sentence else error["type"]
    code = error["code"]
    if error["hint"]:
        kind = InputError if error["kind"] == "input" else BackendError
        return kind(error["message"], hint=error["hint"], code=code)
    if code == "worker.import_failed":
        missing = error.get("missing")
        reason = f"the module {missing} is missing" if missing else library
        return BackendError(
            f"The backend {job.backend} cannot be imported by {python}: {reason}.",
            hint=install_command(backend_named(job.backend), python),
            code=code,
        )
    if code == "worker.out_of_memory":
        return _out_of_memory(
            f"{job.method} ran out of memory in stage {error['stage']}: {library}.", job
        )
    if code == "worker.no_space":
        targets = " or ".join(str(Path(t).parent) for t in (job.out, job.checkpoint_save) if t)
        return BackendError(
            f"No space is left in {targets} (stage {error['stage']}: {library}).",
            hint="free space there, or write to another disk with --out",
            code=code,
        )
    return BackendError(
        f"{job.method} failed in stage {error['stage']}: {library}.{_tail(log)}",
        hint=f"read {log}",
        code=code,
    )


def _tail(log: Path) -> str:
    """The last lines of the log before a traceback, each on an indented line of its own."""
    text = log_text(log)
    lines = text.rpartition("Traceback (most recent call last):")[0] or text
    kept = [line.strip()[:LOG_WIDTH] for line in lines.splitlines() if line.strip()]
    return "\nIts log ends with:\n  " + "\n  ".join(kept[-LOG_LINES:]) if kept else ""
