"""Adapters that end in every way a worker can end; the tests start them in real children.

They need no library, so most of them also run in an empty environment.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from quantkit.backends.process.job import Job, JobError, JobInputError, Reporter, Result


def good(job: Job, report: Reporter, result: Result) -> None:
    """Report what the child sees of its environment."""
    report.stage("work", 2)
    print("a line for the log")
    report.advance(1)
    report.note("one layer was skipped")
    report.note("one layer was skipped")
    report.advance(2)
    seen = {
        "path": sys.path,
        "quantkit": sys.modules["quantkit"].__file__,
        "environment": dict(os.environ),
        "session": os.getsid(0) == os.getpid(),
        "modules": sorted(sys.modules),
    }
    _write(job, "seen.json", json.dumps(seen))


def grows(job: Job, report: Reporter, result: Result) -> None:
    """Take 200 MiB in the first stage only."""
    report.stage("large")
    block = bytearray(200 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    report.stage("small")
    _write(job, "done", "")


def killed(job: Job, report: Reporter, result: Result) -> None:
    report.stage("calibrate")
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(job: Job, report: Reporter, result: Result) -> None:
    ctypes.string_at(0)


def memory_error(job: Job, report: Reporter, result: Result) -> None:
    report.stage("calibrate")
    bytearray(1 << 60)


def torch_out_of_memory(job: Job, report: Reporter, result: Result) -> None:
    import torch

    torch.empty(1 << 50)


def limited(job: Job, report: Reporter, result: Result) -> None:
    """Enter the control group in the options and use more memory than it allows."""
    report.stage("calibrate")
    Path(job.options["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
    block = bytearray(512 << 20)
    block[::4096] = b"x" * len(block[::4096])


def full_device(job: Job, report: Reporter, result: Result) -> None:
    """/dev/full answers every write with ENOSPC."""
    report.stage("export")
    Path("/dev/full").write_text("x")


def torch_save(job: Job, report: Reporter, result: Result) -> None:
    import torch

    report.stage("save state")
    assert job.checkpoint_save is not None
    torch.save(torch.zeros(64 << 20, dtype=torch.uint8), f"{job.checkpoint_save}.partial")


def library_error(job: Job, report: Reporter, result: Result) -> None:
    report.stage("export")
    print("the last thing that the library said")
    raise ValueError("Cannot pack weight with\ninput dimension 576")


def job_error(job: Job, report: Reporter, result: Result) -> None:
    raise JobError("Calibration ran zero times.", hint="give data", code="calibration.never_ran")


def input_error(job: Job, report: Reporter, result: Result) -> None:
    raise JobInputError("Another model.", hint="name it", code="state.other_model")


def fails_on_rank_1(job: Job, report: Reporter, result: Result) -> None:
    """Rank 0 waits for one that will not come."""
    _wait_as_rank_0(job)
    raise JobInputError("rank 1 cannot.", hint="nothing", code="ranks.test")


def killed_on_rank_1(job: Job, report: Reporter, result: Result) -> None:
    _wait_as_rank_0(job)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_as_rank_0(job: Job) -> None:
    waiting = Path(job.out, "pid")
    if job.rank == 0:
        waiting.write_text(str(os.getpid()))
        time.sleep(600)
    while not waiting.exists():
        time.sleep(0.01)


def no_files(job: Job, report: Reporter, result: Result) -> None:
    Path(job.out).mkdir()


def leaves_without_result(job: Job, report: Reporter, result: Result) -> None:
    os._exit(0)


def leaves_garbage(job: Job, report: Reporter, result: Result) -> None:
    Path("result.json").write_text('{"ok": tru')
    os._exit(0)


def leaves_other_json(job: Job, report: Reporter, result: Result) -> None:
    Path("result.json").write_text('{"fine": true}')
    os._exit(0)


def library_exits(job: Job, report: Reporter, result: Result) -> None:
    sys.exit("a library gave up")


def leaves_grandchild(job: Job, report: Reporter, result: Result) -> None:
    """Succeed, and leave a process behind that holds the pipe of events open."""
    forked = os.fork()
    if forked == 0:
        time.sleep(600)
    _write(job, "pid", str(forked))


def leaves_daemon(job: Job, report: Reporter, result: Result) -> None:
    """Succeed, and leave a process behind that is in no way this one's any more."""
    sys.path.append(job.options["modules"])
    Path(job.out).mkdir()
    import_module("daemon").leave_daemon(str(Path(job.out, "pid")))


def hangs(job: Job, report: Reporter, result: Result) -> None:
    """Write the ids of this process and of one it started, then wait."""
    helper = subprocess.Popen(["sleep", "600"])
    _write(job, "pid", f"{os.getpid()} {helper.pid}")
    report.stage("wait")
    time.sleep(600)


def several(job: Job, report: Reporter, result: Result) -> None:
    """Run the adapter in the options on several variations of the job, in one process.

    Importing a library takes most of a test's time. `outcomes.json` holds each one's result or
    the code and the message of its failure.
    """
    module, _, attribute = job.options["adapter"].partition(":")
    run = getattr(import_module(module), attribute)
    outcomes = {}
    for name, changes in job.options["jobs"].items():
        own = Result()
        try:
            run(Job.from_json({**asdict(job), "options": {}, **changes}), report, own)
        except Exception as error:
            own.error = {"code": getattr(error, "code", ""), "message": str(error)}
        outcomes[name] = asdict(own)
    _write(job, "outcomes.json", json.dumps(outcomes))


def _write(job: Job, name: str, text: str) -> None:
    Path(job.out).mkdir(exist_ok=True)
    Path(job.out, name).write_text(text)


def layered(job: Job, report: Reporter, result: Result) -> None:
    """Three layers, each kept once it is finished; the last waits for the file in the options."""
    assert job.resume_folder is not None
    layers = Path(job.resume_folder)
    done = len(list(layers.iterdir()))
    report.stage("layers", 3)
    report.note(f"from layer {done}")
    report.advance(done)
    for number in range(done, 3):
        while number == 2 and not Path(job.options["go"]).exists():
            time.sleep(0.05)
        (layers / f"layer-{number}").write_text(str(os.getpid()))
        report.advance(number + 1)
    seen = {"threads": os.environ.get("OMP_NUM_THREADS"), "tokens": job.tokens}
    _write(job, "seen.json", json.dumps(seen))
