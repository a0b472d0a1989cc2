"""Every broken input of a user: a clear sentence, the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.quantize import preflight
from quantkit.pipeline.request import Request
from tests.support.cli import QUICK, command, quantkit, refused
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors

pytestmark = pytest.mark.broad

FP8 = ("--method", "modelopt_fp8")
METHODS = ["modelopt_fp8", "llmcompressor_fp8_dynamic"]
"""One of ModelOpt and one of another library, for what must not depend on the backend."""


def only_config(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)


def index(model: Path, shard: str) -> None:
    names = open_checkpoint(model).tensors
    weight_map = dict.fromkeys(names, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing directory": (shutil.rmtree, ("does not exist",)),
    "empty directory": (empty, ("is empty",)),
    "no config": (lambda m: (m / "config.json").unlink(), ("no config.json",)),
    "config that is no JSON": (lambda m: (m / "config.json").write_text("{"), ("config.json",)),
    "config without weights": (only_config, ("no *.safetensors",)),
    "truncated shard": (truncate, ("model.safetensors", "truncated")),
    "missing shard": (lambda m: index(m, "model-00001-of-00002.safetensors"), ("absent",)),
    "index outside": (lambda m: index(m, "../other/model.safetensors"), ("outside",)),
    "quantized already": (
        lambda m: edit_json(
            m / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})
        ),
        ("stale quantization settings", "gptq"),
    ),
    "remote code": (
        lambda m: edit_json(
            m / "config.json",
            lambda c: c.update(
                model_type="novel", auto_map={"AutoModelForCausalLM": "modeling_novel.Novel"}
            ),
        ),
        ("--trust-remote-code", "novel"),
    ),
    "NaN weight": (
        lambda m: edit_tensors(m, not_a_number),
        ("model.layers.1.mlp.up_proj.weight", "1 value"),
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_by_name(
    small_model: Path, tmp_path: Path, case: str, method: str
) -> None:
    damage, telling = BROKEN[case]
    model = copy_checkpoint(small_model, tmp_path / "model")
    damage(model)
    out = tmp_path / "out"
    refused(quantkit("quantize", model, "--method", method, "--out", out, *QUICK), 1, *telling)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


REQUESTS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "unknown method": (("--method", "modelopt_pf8"), 1, ("Did you mean modelopt_fp8",)),
    "no method": ((), 1, ("--method",)),
    "group size": (("--method", "modelopt_int4_awq"), 1, ("576", "would fit: 64, 32, 16")),
    "group size that nothing holds": (
        ("--method", "modelopt_int4_awq", "--set", "group_size=100"), 1, ("would fit",)),
    "calibration that is not there": (
        (*FP8, "--calibration", "defualt"), 1, ("default",)),
    "data file that is not there": ((*FP8, "--calibration", "mine.jsonl"), 1, ("mine.jsonl",)),
    "ignore that matches nothing": (
        (*FP8, "--set", "ignore+=model.layers.7.*"), 1, ("model.layers.7.*", "matches none")),
    "everything ignored": ((*FP8, "--set", "ignore=[\"*\"]"), 1, ("no module is left",)),
    "unknown flag": ((*FP8, "--metod", "x"), 2, ()),
    "no interpreter": ((*FP8, "--python", "nowhere/python"), 1, ("nowhere/python",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
def test_a_wrong_request_is_explained(small_model: Path, tmp_path: Path, case: str) -> None:
    arguments, code, telling = REQUESTS[case]
    run = quantkit("quantize", small_model, "--out", tmp_path / "out", *arguments)
    if code == 2:
        assert run.code == 2
    else:
        refused(run, code, *telling)
    assert list(tmp_path.iterdir()) == []


def test_empty_calibration_and_missing_field(small_model: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.txt"
    nothing.write_text("")
    run = quantkit(
        "quantize", small_model, *FP8, "--out", tmp_path / "out", "--calibration", nothing
    )
    refused(run, 1, "nothing.txt")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "some text"}\n' * 100)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("sources: [{type: file, path: rows.jsonl, text_field: text}]")
    run = quantkit(
        "quantize", small_model, *FP8, "--out", tmp_path / "out", "--calibration", mixture
    )
    refused(run, 1, "text", "body")
    assert not (tmp_path / "out").exists()


def test_errors_are_json_with_json(small_model: Path, tmp_path: Path) -> None:
    run = quantkit("quantize", small_model, "--method", "x", "--out", tmp_path / "out", "--json")
    assert run.document["error"]["code"] == "recipe.unknown_method"
    refused(run, 1)


def test_an_existing_output_is_not_touched(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    refused(quantkit("quantize", small_model, *FP8, "--out", out), 1, "not empty", "--overwrite")
    refused(
        quantkit("quantize", small_model, *FP8, "--out", tmp_path / "new",
                 "--checkpoint-save", out / "mine"),
        1, "state file",
    )  # fmt: skip
    assert (out / "mine").read_text() == "precious"


def test_overwriting_replaces_nothing_but_checkpoints_of_our_own(
    small_model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(small_model, home / "model")
    (home / "notes.txt").write_text("precious")
    quick = ("--method", "rtn_w8a8_dynamic", "--overwrite")
    for source, out, telling in (
        (home / "model", home / "model", f"The output {home / 'model'} is {home / 'model'}"),
        (home / "model", home, f"The output {home} holds {home / 'model'}, which is read"),
        (small_model, home, "was not made by quantkit: it has no quantkit.json"),
        (small_model, home / "model", "--overwrite would delete"),
    ):
        refused(quantkit("quantize", source, *quick, "--out", out), 1, telling)
    assert (home / "notes.txt").read_text() == "precious"
    assert (home / "model" / "model.safetensors").is_file()
    refused(
        quantkit("quantize", home / "model", *FP8, "--out", tmp_path / "new", "--overwrite",
                 "--checkpoint-save", home / "model" / "model.safetensors"),
        1, "lies in the source",
    )  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 120 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(place)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    small_model: Path, small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes(40_000_000))
    run = quantkit("quantize", small_model, *FP8, "--out", small_disk / "out", *QUICK)
    refused(run, 1, "GB free", "more")
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.library
def test_a_disk_that_fills_up_loses_nothing(
    small_model: Path, small_disk: Path, method: str
) -> None:
    arguments = command(
        "quantize", small_model, "--method", method, "--out", small_disk / "out", *QUICK,
        "--set", "shard_size=5MB",
    )  # fmt: skip
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as run:
        while not (small_disk / "out.partial").exists():
            assert run.poll() is None
            time.sleep(0.05)
        (small_disk / "filler").write_bytes(bytes(100_000_000))
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 3, errors
    assert "No space is left" in errors
    assert not (small_disk / "out").exists()
    assert not (small_disk / "out.partial").exists()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delay", [0.0, 0.3, 4.0])
@pytest.mark.library
def test_ctrl_c_at_any_moment_leaves_nothing(
    small_model: Path, tmp_path: Path, delay: float, method: str
) -> None:
    out = tmp_path / "out"
    arguments = command("quantize", small_model, "--method", method, "--out", out, *QUICK)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as run:
        while not catches(run.pid, signal.SIGTERM):  # until then it is Python that starts
            assert run.poll() is None
            time.sleep(0.005)
        time.sleep(delay)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    # Where the exception passed through an exec() of text (as dataclasses do at import), Python
    # ends by the signal itself: a shell says 130 for both.
    assert run.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_that_python_cannot_raise_comes_again() -> None:
    """In a finalizer, as in the import system's callbacks."""
    work = """
import os, signal, sys, time, types
from quantkit.cli.main import main
class Gone:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
def run():
    Gone()
    time.sleep(60)
    sys.exit("worked on")
sys.modules["quantkit.cli.app"] = types.SimpleNamespace(run=run)
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", work], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("ignored", [False, True], ids=["", "in a shell's background"])
@pytest.mark.parametrize("start", ["-m quantkit", "-c from quantkit.cli.main import main; main()"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_modules_are_imported(
    tmp_path: Path, number: signal.Signals, start: str, ignored: bool
) -> None:
    """A module in the place of the first heavy one sends the signal itself."""
    send = f"import os\nos.kill(os.getpid(), {int(number)})\nraise SystemExit('imported on')\n"
    (tmp_path / "typer.py").write_text(send)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, *start.split(" ", 1)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )  # fmt: skip
    if ignored and number == signal.SIGINT:
        assert (run.returncode, run.stderr) == (1, "imported on\n")
    else:
        assert (run.returncode, run.stderr) == (130, "")


def test_a_read_only_place_is_refused(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = quantkit("quantize", small_model, *FP8, "--out", tmp_path / "file" / "out", *QUICK)
    refused(run, 1, "not a directory that can be written")


def test_experts_are_refused_before_the_long_job(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    make: Any = AutoModelForCausalLM.from_config
    config = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=128,
    )  # fmt: skip
    make(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "moe")
    all_of_them = ("--method", "autoround_w4a16", "--set", "group_size=32", "--set", "experts=all")
    run = quantkit("quantize", tmp_path / "moe", *all_of_them, "--out", tmp_path / "out")
    refused(run, 1, "4 experts", "experts=routed")
    plan = make_plan(open_checkpoint(tmp_path / "moe"), load_recipe("modelopt_fp8"))
    routers = [name for name, why in plan.kept.items() if "@routers" in why or "router" in why]
    assert routers == ["model.layers.0.block_sparse_moe.gate"]
    assert sum(".experts." in name for name in plan.layers) == 12


def test_an_unusable_request_costs_no_torch_import(tmp_path: Path) -> None:
    probe = (
        "import sys\nfrom pathlib import Path\n"
        "from quantkit.pipeline.quantize import preflight\n"
        "from quantkit.pipeline.request import Request\n"
        "from quantkit.backends.registry import load_recipe\n"
        "from quantkit.errors import InputError\n"
        "try: preflight(Request('nowhere', load_recipe('modelopt_fp8'), Path('out')))\n"
        "except InputError: sys.exit('torch' in sys.modules)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    assert (
        subprocess.run([sys.executable, "-c", probe], env=environment, check=False).returncode == 0
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.library
def test_two_runs_into_one_output(small_model: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    arguments = command("quantize", small_model, "--method", method, "--out", out, *QUICK)
    with (
        subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as first,
        subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as second,
    ):
        errors = [run.communicate(timeout=120)[1] for run in (first, second)]
    assert sorted(run.returncode for run in (first, second)) == [0, 1], errors
    told = errors[0] if first.returncode else errors[1]
    assert "Another quantkit run" in told
    assert (tmp_path / "out" / "quantkit.json").is_file()


def test_the_plan_names_every_reason_at_once(small_model: Path) -> None:
    recipe = load_recipe("modelopt_fp8", ("on_nan=keep16",))
    with pytest.raises(InputError, match="on_nan=keep16"):
        preflight(Request(str(small_model), recipe, Path("out")))
