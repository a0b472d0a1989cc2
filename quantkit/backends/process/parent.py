"""The parent's side of the worker: start it, follow it, and say clearly how it ended."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.backends.environments import install_command
from quantkit.backends.process import worker
from quantkit.backends.process.job import Job, Reporter, Result
from quantkit.backends.registry import backend_named
from quantkit.errors import BackendError, InputError, QuantkitError

POLL_SECONDS = 0.2
OOM_WINDOW_SECONDS = 30.0
LOG_LINES = 5
LOG_WIDTH = 300
VMSTAT = Path("/proc/vmstat")


def run_worker(job: Job, *, python: Path, log: Path, report: Reporter) -> Result:
    """Run `job` in a child process of the interpreter `python` and return what it did.

    The child leads a process group of its own, which is killed whole when this call ends for any
    reason, Ctrl-C included; the kernel kills the child when this process dies. Its stdout and
    stderr go to the file `log` as they come, its progress to `report`. A half-written
    `job.checkpoint_save` is removed.

    Raises InputError when the adapter blames the job, BackendError otherwise, with the code
    `worker.no_interpreter`, `.import_failed`, `.killed`, `.out_of_memory`, `.no_space`,
    `.bad_result`, `.failed` or the adapter's own.
    """
    with tempfile.TemporaryDirectory(prefix="quantkit-") as work:
        job_file, result_file = Path(work, "job.json"), Path(work, "result.json")
        job.write(job_file)
        try:
            ending = _run(job_file, result_file, python, log, report)
            return _conclude(ending, job, python, log, result_file)
        finally:
            if job.checkpoint_save:
                Path(job.checkpoint_save + ".partial").unlink(missing_ok=True)


@dataclass
class _Ending:
    """How a worker ended: its exit status, the failure it announced, whether memory ran out."""

    status: int = 0
    error: dict[str, str] | None = None
    oom_killer: bool = False
    stages: list[str] = field(default_factory=list)


def _run(
    job_file: Path, result_file: Path, python: Path, log: Path, report: Reporter
) -> _Ending:  # fmt: skip
    events, events_of_child = os.pipe()
    script = Path(worker.__file__).resolve()
    try:
        with log.open("wb") as log_handle:
            child = subprocess.Popen(
                [str(python), str(script), str(job_file), str(result_file)],
                stdin=subprocess.DEVNULL,
                stdout=log_handle,
                stderr=subprocess.STDOUT,
                pass_fds=(events_of_child,),
                start_new_session=True,
                cwd=job_file.parent,
                env=child_environment() | {"QUANTKIT_EVENTS_FD": str(events_of_child)},
            )
    except OSError as error:
        os.close(events)
        raise BackendError(
            f"The worker cannot be started with {python}: {error.strerror}.",
            hint="name an interpreter with --python",
            code="worker.no_interpreter",
        ) from error
    finally:
        os.close(events_of_child)
    try:
        return _follow(child, events, report)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        os.close(events)


def child_environment() -> dict[str, str]:
    """The child's environment: no downloads, no unsafe unpickling, the same hashes every run."""
    child = dict(os.environ)
    child.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    child.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
        PYTHONHASHSEED="0",
        QUANTKIT_PARENT_PID=str(os.getpid()),
    )
    return child


def _follow(child: subprocess.Popen[bytes], events: int, report: Reporter) -> _Ending:
    """Pass events on until the child is gone, even if a grandchild keeps the pipe open."""
    ending = _Ending()
    rest = b""
    kills, last_kill = oom_kills(), -OOM_WINDOW_SECONDS
    while True:
        readable, _, _ = select.select([events], [], [], POLL_SECONDS)
        if kills != oom_kills():
            kills, last_kill = oom_kills(), time.monotonic()
        if readable:
            chunk = os.read(events, 1 << 16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                _pass_on(line, ending, report)
        elif child.poll() is not None:
            break
    ending.status = child.wait()
    recent = time.monotonic() - last_kill < OOM_WINDOW_SECONDS
    ending.oom_killer = recent or kills != oom_kills()
    return ending


def _pass_on(line: bytes, ending: _Ending, report: Reporter) -> None:
    event: dict[str, Any] = json.loads(line)
    kind = event["event"]
    if kind == "stage":
        ending.stages.append(event["name"])
        report.stage(event["name"], event["total"], event["unit"])
    elif kind == "advance":
        report.advance(event["done"])
    elif kind == "note":
        report.note(event["text"])
    elif kind == "error":
        ending.error = event["error"]


def oom_kills(vmstat: Path = VMSTAT) -> int:
    """Processes that the kernel has killed for memory since it started (0 where it won't say).

    `oom_kill` of proc_vmstat(5) counts kills by cgroup limits too.
    """
    with suppress(OSError):
        for line in vmstat.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _conclude(ending: _Ending, job: Job, python: Path, log: Path, result_file: Path) -> Result:
    if ending.status < 0:
        raise _killed(ending, job, log)
    try:
        result = Result.read(result_file)
    except (OSError, ValueError, TypeError) as error:
        if ending.error is None:
            raise _bad_result(
                job, log, f"left no readable result (exit status {ending.status}, {error})"
            ) from error
        result = Result(error=ending.error)
    if result.error is not None:
        raise _failure(result.error, job, python, log)
    out = Path(job.out)
    if not result.ok or ending.status != 0:
        raise _bad_result(job, log, f"reports ok={result.ok} with exit status {ending.status}")
    if not out.is_dir() or not any(out.iterdir()):
        raise _bad_result(job, log, f"reports success, but {out} holds no files")
    return result


def _killed(ending: _Ending, job: Job, log: Path) -> BackendError:
    where = f" in stage {ending.stages[-1]}" if ending.stages else ""
    if ending.status == -signal.SIGKILL and ending.oom_killer:
        return _out_of_memory(
            f"The worker of {job.method} was killed{where} because the machine or its container "
            "ran out of memory."
        )
    try:
        name = signal.Signals(-ending.status).name
    except ValueError:
        name = f"signal {-ending.status}"
    return BackendError(
        f"The worker of {job.method} was killed by {name}{where}.{_tail(log)}",
        hint=f"read {log}, then run the command again",
        code="worker.killed",
    )


def _out_of_memory(message: str) -> BackendError:
    return BackendError(
        message,
        hint="add --set calibration.batch_size=1, shorten calibration.sequence_length, "
        "or use a machine with more memory",
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
            f"{job.method} ran out of memory in stage {error['stage']}: {library}."
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
    with suppress(OSError):
        with log.open("rb") as handle:
            handle.seek(max(0, log.stat().st_size - (1 << 16)))
            text = handle.read().decode("utf-8", "replace")
        lines = text.rpartition("Traceback (most recent call last):")[0] or text
        kept = [line.strip()[:LOG_WIDTH] for line in lines.splitlines() if line.strip()]
        if kept:
            return "\nIts log ends with:\n  " + "\n  ".join(kept[-LOG_LINES:])
    return ""
