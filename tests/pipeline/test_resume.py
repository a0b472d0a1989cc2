"""A killed run of every library goes on with --resume and ends with the same tensors."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantkit.backends.process.job import Result
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.provenance import LOG
from quantkit.errors import InputError
from quantkit.pipeline.unfinished import Unfinished
from tests.support.cli import QUICK, command, quantkit, refused
from tests.support.helpers import cut_layers
from tests.support.mixtures import mixture

METHODS: dict[str, tuple[str, ...]] = {
    "llmcompressor_w4a16": ("--set", "group_size=64"),
    "modelopt_fp8": (),
    "gptqmodel_w4a16": ("--set", "group_size=64"),
    "autoround_w4a16": ("--set", "group_size=64", "--set", "options.iters=2"),
}
KEY = {"recipe": {"name": "a", "scheme": "fp8"}, "versions": {"quantkit": "1"}}


@pytest.fixture(scope="module")
def two_layers(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_layers(demo_model, tmp_path_factory.mktemp("models") / "two", 2)


def arguments(model: Path, method: str, out: Path, *more: str) -> tuple[str | Path, ...]:
    settings = (*QUICK, *METHODS[method])
    return ("quantize", model, "--method", method, "--out", out, "--device", "cpu",
            *settings, *more)  # fmt: skip


def killed(run: tuple[str | Path, ...], when: Callable[[], bool]) -> None:
    """Kill a command once something is so; all that it started must follow it."""
    with subprocess.Popen(
        command(*run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not when():
            time.sleep(0.005)
        started: list[Any] = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert process.returncode == -9
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


CHECKPOINTS = {"gptqmodel_w4a16": "CURRENT", "autoround_w4a16": "group_0/resume_manifest.json"}
"""What a library's own layer checkpoints have once a layer is finished."""


def at_work(method: str, out: Path) -> bool:
    """Whether a layer is finished, or the library loaded where it has no layer checkpoints."""
    if method in CHECKPOINTS:
        layers = out.with_name("out.partial") / ".stream" / "layers"
        return (layers / CHECKPOINTS[method]).is_file()
    log = out.with_name(out.name + ".log")
    return log.is_file() and len(log.read_bytes().splitlines()) > 1


@pytest.mark.library
@pytest.mark.parametrize("method", METHODS)
def test_a_kill_in_the_library_and_one_in_publish(
    method: str, two_layers: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    state = tmp_path / "out.partial" / ".stream"
    done = quantkit(*arguments(two_layers, method, whole))
    assert done.code == 0, done.err
    expected = open_checkpoint(whole).digests()
    assert {path.name for path in tmp_path.iterdir()} == {"whole"}
    killed(arguments(two_layers, method, out), lambda: at_work(method, out))
    assert not out.exists()
    killed(arguments(two_layers, method, out, "--resume"), (state / "done.json").is_file)
    assert not out.exists()
    last = quantkit(*arguments(two_layers, method, out, "--resume"))
    assert last.code == 0, last.err
    assert "resumed after the library's finished stage" in last.err
    assert open_checkpoint(out).digests() == expected
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


@pytest.mark.slow
@pytest.mark.library
def test_a_mixture_goes_on_after_a_tuned_block(tmp_path: Path) -> None:
    """With the tokens that the experts of finished blocks saw, which do not run again."""
    method, model = "autoround_w4a16", mixture("mixtral", tmp_path / "model")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert quantkit(*arguments(model, method, whole)).code == 0
    killed(arguments(model, method, out), lambda: at_work(method, out))
    assert not out.exists()
    last = quantkit(*arguments(model, method, out, "--resume"))
    assert last.code == 0, last.err
    assert open_checkpoint(out).digests() == open_checkpoint(whole).digests()
    experts = [json.loads((made / "quantkit.json").read_text())["experts"] for made in (whole, out)]
    assert experts[0] == experts[1]


@pytest.mark.library
@pytest.mark.slow
def test_a_smaller_placement_goes_on(demo_model: Path, tmp_path: Path) -> None:
    """From finished layers, and elsewhere from the finished stage, with the same tensors."""
    four, method = cut_layers(demo_model, tmp_path / "four", 4), "modelopt_fp8"
    layerwise = ("--set", "placement=layerwise")
    whole, out = tmp_path / "whole", tmp_path / "out"
    state = tmp_path / "out.partial" / ".stream"
    done = quantkit(*arguments(four, method, whole, "--set", "placement=resident"))
    assert done.code == 0, done.err
    second = state / "layers" / "layer_0001" / "next_inputs.pt"
    killed(arguments(four, method, out, *layerwise), second.is_file)
    killed(arguments(four, method, out, *layerwise, "--resume"), (state / "done.json").is_file)
    log = (state / "library" / LOG).read_text()
    assert "resuming layerwise calibration from layer" in log
    last = quantkit(*arguments(four, method, out, "--set", "placement=resident", "--resume"))
    assert last.code == 0, last.err
    assert "resumed after the library's finished stage" in last.err
    assert open_checkpoint(out).digests() == open_checkpoint(whole).digests()


@pytest.mark.library
def test_another_run_is_refused_and_loses_nothing(two_layers: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "out.partial" / ".stream"
    killed(arguments(two_layers, "modelopt_fp8", out), (state / "done.json").is_file)
    before = sorted(path.name for path in (state / "library").iterdir())
    other = quantkit(*arguments(two_layers, "modelopt_fp8", out, "--resume", "--set", "seed=7"))
    refused(other, 1, "recipe seed was", "without --resume")
    streamed = quantkit("quantize", two_layers, "--method", "rtn_fp8_dynamic", "--out", out,
                        "--device", "cpu", "--resume")  # fmt: skip
    refused(streamed, 1, "another backend", "without --resume")
    assert sorted(path.name for path in (state / "library").iterdir()) == before


@pytest.mark.library
@pytest.mark.parametrize("method", CHECKPOINTS)
def test_a_layer_checkpoint_cut_short_is_told(
    method: str, two_layers: Path, tmp_path: Path
) -> None:
    out, layers = tmp_path / "out", tmp_path / "out.partial" / ".stream" / "layers"
    killed(arguments(two_layers, method, out), lambda: at_work(method, out))
    files = [path for path in layers.rglob("*") if path.is_file() and path.suffix != ".json"]
    for path in files:
        if "end-" not in path.name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(quantkit(*arguments(two_layers, method, out, "--resume")), 1, "without --resume")
    assert any(layers.iterdir())


def begun(partial: Path) -> Unfinished:
    partial.mkdir(exist_ok=True)
    state = Unfinished(partial)
    assert not state.open(KEY, resume=False)
    state.begin()
    (state.library / "config.json").write_text("{}")
    (state.library / "model.safetensors").write_bytes(b"weights")
    return state


def test_a_finished_stage_is_found_and_placed(tmp_path: Path) -> None:
    begun(tmp_path / "p").finish(Result(ok=True, notes=["a"]))
    (tmp_path / "p" / "half-sealed").write_text("")
    again = Unfinished(tmp_path / "p")
    assert again.open(KEY, resume=True)
    assert again.finished() == Result(ok=True, notes=["a"])
    again.place()
    (tmp_path / "p" / "config.json").write_text("sealed")
    assert again.finished() is not None, "sealing changes no file of the state"
    again.clear()
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        "config.json", "model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["cut", "missing", "added", "record"])
def test_a_damaged_stage_is_done_again(damage: str, tmp_path: Path) -> None:
    state = begun(tmp_path / "p")
    state.finish(Result(ok=True))
    weights = state.library / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(b"weig")
    elif damage == "missing":
        weights.unlink()
    elif damage == "added":
        (state.library / "more").write_text("")
    else:
        (state.folder / "done.json").write_text('{"result"')
    assert state.open(KEY, resume=True)
    assert state.finished() is None
    state.begin()
    assert not any(state.library.iterdir())


def test_without_resume_nothing_of_a_run_before_is_kept(tmp_path: Path) -> None:
    begun(tmp_path / "p").finish(Result(ok=True))
    state = Unfinished(tmp_path / "p")
    assert not state.open(KEY, resume=False)
    assert state.finished() is None


def test_layers_of_another_placement_are_not_gone_on_with(tmp_path: Path) -> None:
    state = begun(tmp_path / "p")
    assert not state.move("resident on cuda:0")
    state.begin()
    (state.layers / "layer-0").write_text("x")
    assert not state.move("resident on cuda:0")
    assert state.has_layers()
    assert state.move("layerwise on cuda:0")
    assert not state.has_layers()
    state.begin()
    assert not any(state.library.iterdir())
    assert not state.move("layerwise on cuda:0")


@pytest.mark.parametrize(
    ("other", "telling"),
    [
        ({"recipe": {"name": "a", "scheme": "int4"}}, 'recipe scheme was "fp8", is "int4"'),
        ({"versions": {"quantkit": "2"}}, 'versions quantkit was "1", is "2"'),
    ],
)
def test_what_differs_is_told(other: dict[str, Any], telling: str, tmp_path: Path) -> None:
    state = begun(tmp_path / "p")
    state.finish(Result(ok=True))
    with pytest.raises(InputError) as caught:
        Unfinished(tmp_path / "p").open({**KEY, **other}, resume=True)
    assert caught.value.code == "resume.other_settings"
    assert telling in caught.value.message
    assert state.finished() is not None


def test_a_state_of_an_older_version_is_refused(tmp_path: Path) -> None:
    state = begun(tmp_path / "p")
    job = json.loads((state.folder / "job.json").read_text())
    (state.folder / "job.json").write_text(json.dumps({**job, "version": 0}))
    with pytest.raises(InputError, match="version was 0, is 1"):
        state.open(KEY, resume=True)


def test_a_library_s_own_checkpoints_keep_what_it_wrote(tmp_path: Path) -> None:
    state = begun(tmp_path / "p")
    (state.layers / "layer-0").write_text("x")
    assert state.worth_keeping()
    assert state.open(KEY, resume=True)
    state.begin()
    assert (state.library / "model.safetensors").is_file()
