"""Child process entry: `PYTHON …/backends/process/worker.py job.json result.json EVENTS_FD`.

Also runs where quantkit is not installed, so everything before the adapter's library is the
standard library. The folder of this file is taken off `sys.path` (its modules would shadow
others), and only the package `quantkit` is made importable: the rest of the parent's environment
must not leak into another interpreter.

Progress goes as one JSON object a line to the file descriptor EVENTS_FD; stdout and stderr are the
log. `result.json` is always written, with the failure when there was one.
"""

from __future__ import annotations

import sys

sys.path[:] = [entry for entry in sys.path if entry != __file__.rpartition("/")[0]]

import errno  # noqa: E402
import faulthandler  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import importlib.metadata  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from quantkit.backends.process.job import Adapter, Job, Result, Unit

PR_SET_PDEATHSIG = 1
NO_SPACE_BYTES = 1 << 16
LIBRARIES = (
    "torch", "transformers", "nvidia-modelopt", "llmcompressor", "compressed-tensors",
    "auto-round", "gptqmodel", "msmodelslim", "accelerate", "safetensors", "numpy",
)  # fmt: skip
"""Distributions whose versions shape a checkpoint, recorded where they are installed."""


class WorkerReporter:
    """The worker's `Reporter`: times the stages and sends events to the parent."""

    def __init__(self, result: Result, descriptor: int) -> None:
        self.result = result
        self.name = ""
        self.started = self.used = 0.0
        self.descriptor = descriptor
        os.set_inheritable(descriptor, False)

    def send(self, event: str, **values: object) -> None:
        with suppress(BrokenPipeError):
            os.write(self.descriptor, json.dumps({"event": event, **values}).encode() + b"\n")

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        self.finish()
        self.name, self.started, self.used = name, time.monotonic(), time.process_time()
        self.send("stage", name=name, total=total, unit=unit)

    def advance(self, done: int) -> None:
        self.send("advance", done=done)

    def note(self, text: str) -> None:
        if text not in self.result.notes:
            self.result.notes.append(text)
            self.send("note", text=text)

    def finish(self) -> None:
        """End the current stage: its seconds, those of its processors, its peak of memory."""
        peak = take_peak_rss()
        self.result.peak_rss_bytes = max(self.result.peak_rss_bytes, peak)
        if self.name:
            self.result.stages.append(
                {
                    "name": self.name,
                    "seconds": round(time.monotonic() - self.started, 3),
                    "cpu_seconds": round(time.process_time() - self.used, 3),
                    "peak_rss_bytes": peak,
                }
            )
        self.name = ""


def take_peak_rss() -> int:
    """Peak resident bytes since the last call (proc(5): VmHWM, reset by writing 5 to clear_refs).

    getrusage is no substitute: its peak starts at that of the process that forked this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            return int(line.split()[1]) * 1024
    return 0


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent is gone (prctl(2))."""
    parent = os.environ.pop("QUANTKIT_PARENT_PID", "")
    if parent:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            sys.exit("the parent process is gone")


def bind_package() -> None:
    """Make this copy of quantkit importable, and nothing else of the folder it lies in."""
    folder = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        "quantkit", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["quantkit"] = package
    spec.loader.exec_module(package)


def load_adapter(reference: str) -> Adapter:
    """The function behind `"module:attr"`; importing it imports the backend's library.

    Modules stay until the process ends: looking for garbage among their millions of objects is a
    fifth of the time of an import, and would be of every later collection.
    """
    module, _, attribute = reference.partition(":")
    gc.disable()
    try:
        run: Adapter = getattr(importlib.import_module(module), attribute)
    finally:
        gc.freeze()
        gc.enable()
    return run


def hide_accelerators() -> None:
    """Leave the libraries of a job on the CPU no other device: some take the first GPU there is."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        os.environ[name] = ""


def compute_in_float32() -> str:
    """Mend slow bfloat16 products (see `float32_products`) where the adapter brought torch; how."""
    if "torch" not in sys.modules:
        return ""
    from quantkit.backends.process import float32_products

    float32_products.install()
    return float32_products.described()


def installed_versions() -> dict[str, str]:
    """Versions of Python and of every library of `LIBRARIES` that is installed here."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def describe(error: BaseException, job: Job | None, stage: str) -> dict[str, str]:
    """The `error` entry of a Result for an exception raised in `stage`."""
    from quantkit.backends.process.job import JobError, JobInputError

    described = {
        "kind": "input" if isinstance(error, JobInputError) else "backend",
        "code": _code(error, job, stage),
        "type": type(error).__name__,
        "message": str(error),
        "hint": error.hint if isinstance(error, JobError) else "",
        "stage": stage,
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, ImportError) and error.name:
        described["missing"] = error.name
    return described


def _code(error: BaseException, job: Job | None, stage: str) -> str:
    from quantkit.backends.process.job import JobError

    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    if isinstance(error, JobError):
        return error.code
    if any(is_out_of_memory(e) for e in chain):
        return "worker.out_of_memory"
    if any(_is_no_space(e) for e in chain) or (job is not None and _disk_is_full(job)):
        return "worker.no_space"
    missing = isinstance(error, ModuleNotFoundError)
    return "worker.import_failed" if missing or stage == "import" else "worker.failed"


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, the accelerators' (torch.OutOfMemoryError) and torch's CPU allocator's."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        "MemoryError" in names
        or "OutOfMemoryError" in names
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
        or "DefaultCPUAllocator: not enough memory" in str(error)
    )


def _is_no_space(error: BaseException) -> bool:
    """Python's ENOSPC or EDQUOT, or the same in the text of a library written in Rust or C++."""
    return (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    ) or "No space left on device" in str(error)


def _disk_is_full(job: Job) -> bool:
    """torch.save hides ENOSPC behind a message about positions, so the disks themselves count."""
    for target in (job.out, job.checkpoint_save):
        if target:
            with suppress(OSError):
                if shutil.disk_usage(Path(target).parent).free < NO_SPACE_BYTES:
                    return True
    return False


def main(job_file: str, result_file: str, events: int) -> int:
    """Run one job; 0 when it succeeded."""
    die_with_parent()
    faulthandler.enable()
    bind_package()
    from quantkit.backends.process.job import Job, Result

    result = Result()
    progress = WorkerReporter(result, events)
    progress.stage("import")
    job: Job | None = None
    try:
        job = Job.read(Path(job_file))
        if job.ranks and job.rank is None:
            from quantkit.backends.process import ranks

            progress.name = ""
            result = ranks.run(job, events)
        else:
            if job.device == "cpu":
                hide_accelerators()
            run = load_adapter(job.adapter)
            result.compute = compute_in_float32()
            progress.finish()
            run(job, progress, result)
    except BaseException as error:
        with suppress(OSError):
            traceback.print_exc()
        result.error = describe(error, job, progress.name or "start")
        progress.send("error", error=_short(result.error))
    progress.finish()
    result.ok = result.error is None
    result.versions = {**installed_versions(), **result.versions}
    result.write(Path(result_file))
    return 0 if result.ok else 1


def _short(error: dict[str, Any]) -> dict[str, Any]:
    """What the parent needs when a full disk also keeps the result from being written."""
    return {key: str(value)[:500] for key, value in error.items() if key != "traceback"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
