"""Killed, out of space, changed underneath: what a streamed run leaves and how it goes on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from quantkit.backends.process.job import Unit
from quantkit.backends.registry import load_recipe
from quantkit.backends.streaming.run import clear_state
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import BackendError, InputError
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.request import Request
from tests.streaming.test_load import Quiet
from tests.support.helpers import edit_json
from tests.support.streaming import stream, write_model

pytestmark = pytest.mark.broad

ROOT = Path(__file__).parents[2]
CHILD = (
    "import sys; from pathlib import Path; from tests.support.streaming import stream\n"
    "source, out, scheme = sys.argv[1:4]\n"
    "stream(Path(source), Path(out), scheme, resume='resume' in sys.argv, jobs=2)\n"
    "print('done')"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random layers in four shards, fused groups torn apart: enough work to be killed in."""
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    for layer in range(8):
        for number, leaf in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            name = f"model.layers.{layer}.self_attn.{leaf}.weight"
            shards[number][name] = torch.randn(1024, 1024, generator=generator).bfloat16()
    config = {"hidden_size": 1024, "num_hidden_layers": 8}
    return write_model(tmp_path_factory.mktemp("resume") / "model", shards, config)


def child(model: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(model), str(out), "nvfp4a16", *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def files_of(out: Path) -> dict[str, bytes]:
    clear_state(out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def killed(process: subprocess.Popen[str], out: Path, delay: float) -> str:
    """Kill a child once it writes; its workers must follow it. What it had printed."""
    stale = set(out.glob("*.writing"))
    while process.poll() is None and not set(out.glob("*.writing")) - stale:
        time.sleep(0.005)
    time.sleep(delay)
    workers = []
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    told, _ = process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    return told


@pytest.mark.parametrize(
    "seed", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in range(20, 36))]
)
def test_kills_at_random_moments_resume_to_the_same_bytes(
    seed: int, model: Path, tmp_path: Path
) -> None:
    stream(model, tmp_path / "whole", "nvfp4a16")
    expected = files_of(tmp_path / "whole")
    chance = random.Random(seed)
    out = tmp_path / "out"
    done = [killed(child(model, out, "resume"), out, chance.random() * 0.1) for _ in range(3)]
    assert not all(done)
    result = stream(model, out, "nvfp4a16", resume=True, jobs=2)
    assert result.digests == open_checkpoint(out).digests()
    assert files_of(out) == expected


def test_a_lost_worker_is_an_error_that_can_be_resumed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def strike(_done: int, _total: int) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.children() == [] and list(out.glob("*.safetensors")):
                    process.kill()

    with pytest.raises(BackendError, match="killed") as caught:
        stream(model, out, "nvfp4a16", jobs=2, on_progress=strike)
    assert caught.value.code == "stream.worker_lost"
    assert "--resume" in caught.value.hint
    assert not list(out.glob("*.writing"))
    assert stream(model, out, "nvfp4a16", resume=True).resumed


def interrupted(model: Path, out: Path, scheme: str = "nvfp4a16") -> set[str]:
    """Stop a run from its progress once a shard is finished; the finished files."""

    def stop(_done: int, _total: int) -> None:
        if list(out.glob("*.safetensors")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(model, out, scheme, jobs=1, on_progress=stop)
    finished = {path.name for path in out.glob("*.safetensors")}
    assert 0 < len(finished) < 4
    assert not list(out.glob("*.writing"))
    return finished


def test_finished_shards_are_not_done_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished = interrupted(model, out)
    times = {name: (out / name).stat().st_mtime_ns for name in finished}
    seen: list[tuple[int, int]] = []
    result = stream(model, out, "nvfp4a16", resume=True, on_progress=lambda *at: seen.append(at))
    assert set(result.resumed) == finished
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == times
    assert seen[0][0] >= sum(
        info.bytes
        for name, info in open_checkpoint(model).tensors.items()
        if open_checkpoint(out).tensors.keys() & {f"{name[:-7]}.weight_packed"}
        and open_checkpoint(out).tensors[f"{name[:-7]}.weight_packed"].file.name in finished
    )
    whole = stream(model, tmp_path / "whole", "nvfp4a16")
    assert result.digests == whole.digests
    assert result.source_digests == whole.source_digests
    assert result.relative_error == whole.relative_error


def test_a_finished_shard_that_was_damaged_is_done_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    damaged, *rest = sorted(interrupted(model, out))
    data = bytearray((out / damaged).read_bytes())
    data[-5] ^= 1
    (out / damaged).write_bytes(data)
    result = stream(model, out, "nvfp4a16", resume=True)
    assert result.resumed == rest
    assert result.digests == stream(model, tmp_path / "whole", "nvfp4a16").digests


def test_without_resume_nothing_is_kept(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out")
    assert stream(model, tmp_path / "out", "nvfp4a16").resumed == []


def test_resume_of_nothing_starts(model: Path, tmp_path: Path) -> None:
    assert stream(model, tmp_path / "out", "nvfp4a16", resume=True).resumed == []


@pytest.mark.parametrize("change", ["bytes", "quiet bytes", "a shard more", "config"])
def test_a_source_that_changed_is_refused(change: str, model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    out = tmp_path / "out"
    name = min(interrupted(source, out))
    victim = open_checkpoint(source).files[int(name[6:11]) - 1]
    stat = victim.stat()
    if change == "a shard more":
        assert sharded_files(source) == 5
    elif change == "config":
        edit_json(source / "config.json", lambda c: c.update(rope_theta=1.0))
    else:
        with victim.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"x")
    if change == "quiet bytes":
        os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match="changed since") as caught:
        stream(source, out, "nvfp4a16", resume=True)
    assert caught.value.code == "resume.source_changed"
    assert "without --resume" in caught.value.hint


def sharded_files(source: Path) -> int:
    """Split the last shard of a checkpoint in two."""
    from safetensors.torch import load_file, save_file

    last = open_checkpoint(source).files[-1]
    items = sorted(load_file(last).items())
    half = len(items) // 2
    save_file(dict(items[:half]), last)
    added = "model-00005-of-00005.safetensors"
    save_file(dict(items[half:]), source / added)
    moved = dict.fromkeys((name for name, _ in items[half:]), added)
    edit_json(source / "model.safetensors.index.json", lambda i: i["weight_map"].update(moved))
    return len(open_checkpoint(source).files)


@pytest.mark.parametrize(
    "other", [{"clip": "mse"}, {"scheme": "fp8_dynamic"}, {"shard_size": 10**6}]
)
def test_other_settings_are_refused(other: dict[str, Any], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(model, out)
    settings: dict[str, Any] = {"scheme": "nvfp4a16", **other}
    with pytest.raises(InputError, match="other settings") as caught:
        stream(model, out, settings.pop("scheme"), resume=True, **settings)
    assert caught.value.code == "resume.other_settings"


class Stops(Quiet):
    """A user who presses Ctrl-C when a stage begins."""

    def __init__(self, name: str) -> None:
        self._name = name

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        if name == self._name:
            raise KeyboardInterrupt


def test_a_stop_while_the_result_is_verified_costs_no_shard(
    small_model: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    request = Request(str(small_model), load_recipe("rtn_mxfp8"), out, device="cpu", jobs=1)
    with pytest.raises(KeyboardInterrupt):
        quantize(request, Stops("verify"))
    (partial / "quantkit.json").write_text("{}")  # as a kill later on would leave it
    before = (partial / "model.safetensors").stat().st_mtime_ns
    made = quantize(replace(request, resume=True), Quiet()).provenance
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert {path.name for path in out.iterdir()} >= {"config.json", "quantkit.json", "README.md"}
    assert not list(out.glob(".*"))
    assert not partial.exists()
    assert not [note for note in made.notes if "removed" in note]


FULL = """
import sys; from pathlib import Path; from quantkit.errors import BackendError, InputError
from tests.support.streaming import stream
try:
    stream(Path(sys.argv[1]), Path(sys.argv[2]), "w8a8_dynamic", jobs=1)
except InputError as error:
    print(error.code, "|", error.message, "|", error.hint)
kept = sorted(path.name for path in Path(sys.argv[2]).glob("*.safetensors"))
print(*kept)
import subprocess
subprocess.run(["mount", "-o", "remount,size=64m", sys.argv[2]], check=True)
result = stream(Path(sys.argv[1]), Path(sys.argv[2]), "w8a8_dynamic", resume=True)
print(*result.resumed)
print(len(result.digests))
"""


def test_a_full_disk_keeps_what_is_finished(model: Path, tmp_path: Path) -> None:
    """A real file system of 20 MB for an output of 33 MB, then made larger."""
    out = tmp_path / "full"
    out.mkdir()
    script = tmp_path / "full.py"
    script.write_text(FULL)
    mount = (
        f"mount -t tmpfs -o size=20m tmpfs {out} && exec {sys.executable} {script} {model} {out}"
    )
    probe = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(out)], capture_output=True
    )
    if probe.returncode:
        pytest.skip("no right to mount a small file system here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, kept, resumed, count = done.stdout.splitlines()
    assert told.startswith("output.no_space | No space is left")
    assert "MB missing" in told
    assert "--resume" in told
    assert kept.split()
    assert resumed == kept
    assert int(count) == 64
