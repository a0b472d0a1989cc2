"""The worker in real children: what it sees, what it reports, and every way it can end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.backends.child_process import oom_kills
from quantkit.backends.process import parent as process
from quantkit.backends.process.job import Job, Result, Unit
from quantkit.backends.process.parent import run_worker
from quantkit.errors import BackendError, InputError
from quantkit.pipeline.process import run_logged
from tests.support.helpers import alone
from tests.support.processes import DAEMON, wait_until_gone

ADAPTERS = Path(__file__).parent / "adapters"


class Recorder:
    """A Reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        self.events.append(("stage", name, total))

    def advance(self, done: int) -> None:
        self.events.append(("advance", done))

    def note(self, text: str) -> None:
        self.events.append(("note", text))


@pytest.fixture(autouse=True)
def _adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ADAPTERS))


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with nothing but the standard library."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "small-disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def job(tmp_path: Path, adapter: str, **changes: object) -> Job:
    reference = adapter if ":" in adapter else f"worker_adapters:{adapter}"
    fields: dict[str, object] = {
        "task": "quantize",
        "backend": "modelopt",
        "adapter": reference,
        "method": "modelopt_fp8",
        "model": str(tmp_path / "model"),
        "out": str(tmp_path / "out"),
        "scheme": None,
    }
    return Job(**{**fields, **changes})  # type: ignore[arg-type]


def run(tmp_path: Path, adapter: str, python: Path | None = None, **changes: object) -> Result:
    return run_worker(
        job(tmp_path, adapter, **changes),
        python=python or Path(sys.executable),
        log=tmp_path / "log.txt",
        report=Recorder(),
    )


def failure(
    tmp_path: Path, adapter: str, python: Path | None = None, **changes: object
) -> BackendError:
    with pytest.raises(BackendError) as caught:
        run(tmp_path, adapter, python, **changes)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value


def test_worker_runs_where_quantkit_is_not_installed(tmp_path: Path, bare_python: Path) -> None:
    found = subprocess.run(
        [bare_python, "-c", "import quantkit"], capture_output=True, cwd="/", check=False
    )
    assert found.returncode != 0
    report = Recorder()
    log = tmp_path / "log.txt"
    result = run_worker(job(tmp_path, "good"), python=bare_python, log=log, report=report)
    assert result.ok
    assert report.events == [
        ("stage", "import", 0),
        ("stage", "work", 2),
        ("advance", 1),
        ("note", "one layer was skipped"),
        ("advance", 2),
    ]
    assert result.notes == ["one layer was skipped"]
    assert [stage["name"] for stage in result.stages] == ["import", "work"]
    assert set(result.versions) == {"python"}
    assert "a line for the log" in log.read_text()


def test_the_log_of_a_failure_takes_no_file_of_the_users(tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "out.log"
    mine.write_text("my notes")
    for _ in range(2):  # the second takes the place of the log of the first
        with pytest.raises(BackendError) as caught:
            run_logged(job(tmp_path, "killed"), out, Path(sys.executable), out, Recorder())
        assert str(tmp_path / "out.2.log") in str(caught.value.hint)
    assert mine.read_text() == "my notes"
    assert [path.name for path in sorted(tmp_path.glob("*.log"))] == ["out.2.log", "out.log"]


def test_worker_sees_its_own_environment_only(
    tmp_path: Path, bare_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    run(tmp_path, "good", python=bare_python)
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    package = Path(process.__file__).parents[2]
    assert seen["quantkit"] == str(package / "__init__.py")
    assert str(package) not in seen["path"]
    assert not any(entry.startswith(sys.prefix + "/") for entry in seen["path"])
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in seen["environment"]
    assert seen["environment"]["HF_HUB_OFFLINE"] == "1"
    assert seen["session"] is True
    ours = {name for name in seen["modules"] if name.startswith("quantkit")}
    process_side = {"quantkit.backends.process", "quantkit.backends.process.job"}
    schemes = {"quantkit.checkpoint", "quantkit.checkpoint.schemes"}
    assert ours == {"quantkit", "quantkit.backends"} | process_side | schemes
    foreign = {name.partition(".")[0] for name in seen["modules"]} - sys.stdlib_module_names
    started = subprocess.run(
        [bare_python, "-c", "import sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    by_itself = {name.partition(".")[0] for name in started.stdout.split()}  # a sitecustomize
    ours = {"quantkit", "worker_adapters", "__main__"}
    assert foreign == (ours | by_itself) - sys.stdlib_module_names


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_job_on_the_cpu_sees_no_gpu(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLM Compressor took the first GPU for a mixture whose weights were to stay on the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    run(tmp_path, "good", device=device)
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())["environment"]
    assert seen["CUDA_VISIBLE_DEVICES"] == ("" if device == "cpu" else "0,1")


def test_stages_have_their_own_peak_memory_and_processor_time(tmp_path: Path) -> None:
    result = run(tmp_path, "grows")
    used = {stage["name"]: stage["cpu_seconds"] for stage in result.stages}
    assert used["large"] > used["small"]
    peaks = {stage["name"]: stage["peak_rss_bytes"] for stage in result.stages}
    assert peaks["large"] > 200 << 20
    assert peaks["small"] < 100 << 20
    assert result.peak_rss_bytes == peaks["large"]


def test_a_killed_worker_is_its_own_error(tmp_path: Path) -> None:
    error = failure(tmp_path, "killed")
    assert error.code == "worker.killed"
    assert "SIGKILL in stage calibrate" in error.message


def test_a_crash_names_the_signal(tmp_path: Path) -> None:
    error = failure(tmp_path, "crashes")
    assert error.code == "worker.killed"
    assert "SIGSEGV" in error.message
    assert "Segmentation fault" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("adapter", ["memory_error", "torch_out_of_memory"])
def test_an_allocation_that_fails_is_out_of_memory(tmp_path: Path, adapter: str) -> None:
    error = failure(tmp_path, adapter)
    assert error.code == "worker.out_of_memory"
    assert "batch_size" in error.hint
    assert "placement=resident on cpu" in error.message
    assert "more memory" in error.hint


def test_the_kernels_out_of_memory_killer_is_recognised(tmp_path: Path) -> None:
    group = memory_group(128 << 20)
    try:
        with alone("out-of-memory"):
            error = failure(tmp_path, "limited", options={"cgroup": str(group)})
    finally:
        group.rmdir()
    assert error.code == "worker.out_of_memory"
    assert "stage calibrate" in error.message
    assert re.search(r"it held 0\.[0-5] GB \(placement=resident on cpu\)", error.message)


def test_out_of_memory_goes_on_with_a_smaller_placement(tmp_path: Path) -> None:
    for placement, telling in (("resident", "--resume --set placement=layerwise"),
                               ("layerwise", "more memory")):  # fmt: skip
        error = failure(tmp_path, "memory_error", resume_folder=str(tmp_path), placement=placement)
        assert telling in error.hint


def memory_group(limit: int) -> Path:
    """A new control group with a memory limit; skips where this user may not make one."""
    for root, limit_file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"quantkit-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit_file).write_text(str(limit))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return group
    pytest.skip("no control group with a memory limit can be made here")


def test_oom_kills_reads_the_kernels_counter(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 12\noom_kill 7\n")
    assert oom_kills(vmstat) == 7
    assert oom_kills(tmp_path / "absent") == 0


def test_a_missing_library_is_named_with_the_command_that_adds_it(
    tmp_path: Path, bare_python: Path
) -> None:
    error = failure(tmp_path, "quantkit.backends.adapters.modelopt:run", python=bare_python)
    assert error.code == "worker.import_failed"
    assert "the module modelopt is missing" in error.message
    assert error.hint == f"{bare_python} -m pip install nvidia-modelopt"


def test_a_library_that_cannot_be_loaded_is_an_import_failure(tmp_path: Path) -> None:
    error = failure(tmp_path, "imports_broken:run")
    assert error.code == "worker.import_failed"
    assert "libcudart.so.13" in error.message
    assert failure(tmp_path, "imports_missing:run").code == "worker.import_failed"


@pytest.mark.parametrize(
    "adapter", ["leaves_without_result", "leaves_garbage", "leaves_other_json", "no_files"]
)
def test_a_result_that_is_garbage(tmp_path: Path, adapter: str) -> None:
    assert failure(tmp_path, adapter).code == "worker.bad_result"


def test_a_library_that_exits_is_a_failure(tmp_path: Path) -> None:
    error = failure(tmp_path, "library_exits")
    assert error.code == "worker.failed"
    assert "a library gave up" in error.message


def test_a_librarys_exception_becomes_one_sentence(tmp_path: Path) -> None:
    error = failure(tmp_path, "library_error")
    assert error.code == "worker.failed"
    sentence, *tail = error.message.splitlines()
    assert sentence == (
        "modelopt_fp8 failed in stage export: ValueError: Cannot pack weight with input "
        "dimension 576."
    )
    assert tail == ["Its log ends with:", "  the last thing that the library said"]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_an_adapters_own_sentence_is_kept(tmp_path: Path) -> None:
    error = failure(tmp_path, "job_error")
    assert (error.message, error.hint, error.code) == (
        "Calibration ran zero times.", "give data", "calibration.never_ran",
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        run(tmp_path, "input_error")
    assert caught.value.code == "state.other_model"


def test_no_space_left(tmp_path: Path) -> None:
    error = failure(tmp_path, "full_device")
    assert error.code == "worker.no_space"
    assert str(tmp_path) in error.message


def test_torch_save_on_a_full_disk_is_no_space(tmp_path: Path, small_disk: Path) -> None:
    error = failure(
        tmp_path, "torch_save", out=str(small_disk / "out"), checkpoint_save=str(small_disk / "f")
    )
    assert error.code == "worker.no_space"
    assert list(small_disk.iterdir()) == []


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    error = failure(tmp_path, "good", python=tmp_path / "absent")
    assert error.code == "worker.no_interpreter"


def test_what_a_worker_leaves_behind_is_killed(tmp_path: Path) -> None:
    assert run(tmp_path, "leaves_grandchild").ok
    wait_until_gone([int((tmp_path / "out" / "pid").read_text())])


def test_a_daemon_that_outlives_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "daemon.py").write_text(DAEMON)
    assert run(tmp_path, "leaves_daemon", options={"modules": str(tmp_path / "modules")}).ok
    wait_until_gone([int((tmp_path / "out" / "pid").read_text())])


def test_an_interrupt_kills_the_whole_group(tmp_path: Path) -> None:
    class Interrupting(Recorder):
        def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
            if name == "wait":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(
            job(tmp_path, "hangs"),
            python=Path(sys.executable),
            log=tmp_path / "log.txt",
            report=Interrupting(),
        )
    wait_until_gone([int(pid) for pid in (tmp_path / "out" / "pid").read_text().split()])


def test_a_killed_parent_leaves_no_worker(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.backends.test_worker_process import run\n"
        "run(Path(sys.argv[1]), 'hangs')"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{ADAPTERS}"}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    pids = tmp_path / "out" / "pid"
    deadline = time.monotonic() + 30
    while not (pids.is_file() and pids.read_text().count(" ")) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker, helper = (int(pid) for pid in pids.read_text().split())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until_gone([worker])
    os.kill(helper, signal.SIGKILL)
