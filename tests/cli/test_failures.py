"""What nobody expected: a sentence, a hint with the log, an exit code, an object with --json."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import QUICK, Run, command, refused

ROOT = Path(__file__).parents[2]

PLUGIN = """
from quantkit.backends import Backend, Method

def refuses(recipe):
    {fault}

BROKEN = Backend(
    name="broken", adapter="none:run", library="json", distribution="broken", extra="",
    methods={{"w8a16": Method("NONE", "compressed-tensors", calibrated=False)}},
    unsupported=refuses,
)
"""


def run(*args: str | Path, environment: dict[str, str], **more: Any) -> Run:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    done = subprocess.run(
        command(*args), env={**os.environ, **environment}, text=True, check=False, **streams
    )
    return Run(done.returncode, done.stdout or "", done.stderr)


class Plugin:
    """A backend of a package of its own that is installed and broken."""

    def __init__(self, folder: Path) -> None:
        self.site, self.cache = folder / "site", folder / "cache"
        self.recipe = folder / "broken.yaml"
        about = self.site / "quantkit_broken-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Name: quantkit-broken\nVersion: 1.0\n")
        entry = "[quantkit.backends]\nbroken = quantkit_broken:BROKEN\n"
        (about / "entry_points.txt").write_text(entry)
        self.recipe.write_text("backend: broken\nscheme: w8a16\n")
        path = os.environ.get("PYTHONPATH", "")
        self.environment = {
            "PYTHONPATH": f"{self.site}:{path}", "QUANTKIT_CACHE": str(self.cache)
        }  # fmt: skip

    def write(self, fault: str) -> None:
        (self.site / "quantkit_broken.py").write_text(PLUGIN.format(fault=fault))

    def plan(self, model: Path, *more: str, **environment: str) -> Run:
        return run(
            "plan", model, "--recipe", self.recipe, *more,
            environment={**self.environment, **environment},
        )  # fmt: skip

    def log(self) -> Path:
        (log,) = (self.cache / "logs").iterdir()
        return log


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


FAULTS = {
    "internal.unexpected": ("return recipe.no_such_thing", ("AttributeError", "no_such_thing")),
    "system.too_deep": ("return refuses(recipe)", ("nested deeper",)),
    "system.out_of_memory": ("return bytearray(1 << 60)", ("Memory ran out",)),
    "system.no_space": ("open('/dev/full', 'wb', 0).write(b'x')", ("No space is left",)),
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_plugin_that_raises(code: str, plugin: Plugin, small_model: Path) -> None:
    fault, telling = FAULTS[code]
    plugin.write(fault)
    done = plugin.plan(small_model, "--json")
    refused(done, 3, *telling)
    assert len(done.err.splitlines()) == 2
    error = done.document["error"]
    assert error["code"] == code
    assert f"error: {error['message']}\nhint: {error['hint']}\n" == done.err
    log = plugin.log()
    assert str(log) in error["hint"]
    assert "Traceback" in log.read_text()
    assert f"plan {small_model}" in log.read_text()


def test_the_traceback_is_shown_when_it_is_asked_for(plugin: Plugin, small_model: Path) -> None:
    plugin.write("raise ValueError")
    quiet = plugin.plan(small_model, QUANTKIT_DEBUG="0")
    assert quiet.err.startswith("error: quantkit failed unexpectedly: ValueError.\n")
    shown = plugin.plan(small_model, QUANTKIT_DEBUG="1")
    assert shown.code == quiet.code == 3
    assert shown.err.startswith("Traceback")
    assert "in refuses" in shown.err
    assert shown.err.splitlines()[-2] == quiet.err.splitlines()[-2]


def test_a_cache_that_cannot_be_written_leaves_the_log_elsewhere(
    plugin: Plugin, small_model: Path, tmp_path: Path
) -> None:
    plugin.write("raise ValueError")
    plugin.cache.write_text("a file where a folder should be")
    done = plugin.plan(small_model, TMPDIR=str(tmp_path))
    refused(done, 3, str(tmp_path))
    (log,) = tmp_path.glob("quantkit-failure-*.log")
    assert "Traceback" in log.read_text()
    nowhere = plugin.plan(small_model, TMPDIR="/proc")  # Python falls back to the current folder
    refused(nowhere, 3)
    told = re.search(r"its log: (\S+)", nowhere.err)
    if told:
        Path(told[1]).unlink()


def test_a_plugin_that_cannot_be_imported_is_named(plugin: Plugin, small_model: Path) -> None:
    (plugin.site / "quantkit_broken.py").write_text("import no_such_library")
    done = plugin.plan(small_model)
    refused(done, 1, "broken (quantkit_broken:BROKEN)", "no_such_library", "quantkit-broken")


def test_a_package_of_ours_that_cannot_be_imported(tmp_path: Path) -> None:
    """As in a broken environment: what every command needs is missing."""
    (tmp_path / "typer.py").write_text("raise ImportError('libssl.so.3: cannot open')")
    path = f"{tmp_path}:{ROOT}"
    done = run("methods", environment={"PYTHONPATH": path, "QUANTKIT_CACHE": str(tmp_path)})
    refused(done, 3, "ImportError: libssl.so.3", str(tmp_path / "logs"))


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """What `| head -1` leaves of a pipe once it has its line."""
    reads, writes = os.pipe()
    os.close(reads)
    yield writes
    os.close(writes)


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_pipe_that_nobody_reads_any_more(form: tuple[str, ...], closed_pipe: int) -> None:
    done = run("methods", *form, environment={}, stdout=closed_pipe)
    refused(done, 1, "Standard output was closed")
    assert len(done.err.splitlines()) == 2


def test_head_of_the_methods() -> None:
    line = f"set -o pipefail; {sys.executable} -m quantkit methods --json | head -1 > /dev/null"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1)  # whether it all fitted into the pipe
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_full_disk_under_stdout(form: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run("methods", *form, environment={"QUANTKIT_CACHE": str(tmp_path)}, stdout=full)
    refused(done, 3, "No space is left", str(tmp_path / "logs"))
    assert len(done.err.splitlines()) == 2


@pytest.fixture
def no_privilege() -> list[str]:
    """What to put before a command so that modes of files hold for root too."""
    if os.getuid():
        return []
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or subprocess.run([*drop, "true"], check=False).returncode:
        pytest.skip("root cannot give up its rights here")
    return drop


def test_a_folder_that_may_not_be_read(
    small_model: Path, tmp_path: Path, no_privilege: list[str]
) -> None:
    model = shutil.copytree(small_model, tmp_path / "model")
    model.chmod(0)
    done = subprocess.run(
        [*no_privilege, *command("plan", model, "--method", "rtn_w8a16", "--json")],
        env={**os.environ, "QUANTKIT_CACHE": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    model.chmod(0o700)
    refused(Run(done.returncode, done.stdout, done.stderr), 3, str(model), "Permission denied")
    assert json.loads(done.stdout)["error"]["code"] == "system.no_permission"


FULL_CACHE = """
mount -t tmpfs -o size=64k tmpfs "$1" && head -c 65536 /dev/zero > "$1/filler"; shift
exec "$@"
"""


def test_a_full_disk_under_the_cache(small_model: Path, tmp_path: Path) -> None:
    """A real file system without a free byte, where calibration would write its tokens."""
    cache = tmp_path / "cache"
    cache.mkdir()
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(cache)]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    words = command(
        "quantize", small_model, "--method", "modelopt_fp8", "--out", tmp_path / "out", "--json",
        "--device", "cpu", *QUICK,
    )  # fmt: skip
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL_CACHE, "sh", str(cache), *words],
        env={**os.environ, "QUANTKIT_CACHE": str(cache), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    run = Run(done.returncode, done.stdout, done.stderr)
    refused(run, 1, "No space left", str(cache))
    assert not (tmp_path / "out").exists()
