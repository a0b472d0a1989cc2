"""What a backend cannot do is refused in the plan, with the reason and what would work."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from quantkit.backends.registry import backends, load_recipe
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.pipeline.plan import make_plan
from tests.support.cli import QUICK, command, inside, quantkit, refused
from tests.support.families import model
from tests.support.helpers import alone, edit_json


def refusal(model: Path, method: str, *sets: str, device: str = "cpu") -> str:
    with pytest.raises(InputError) as caught:
        make_plan(open_checkpoint(model), load_recipe(method, sets), device=device)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize(
    ("method", "library"),
    [
        ("llmcompressor_w4a16_awq", "llmcompressor"),
        ("gptqmodel_awq_w4a16", "GPTQModel"),
        ("modelopt_nvfp4_awq", "nvidia-modelopt"),
    ],
)
def test_what_needs_an_accelerator_is_refused_on_a_cpu_only(
    small_model: Path, method: str, library: str
) -> None:
    sets = () if "nvfp4" in method else ("group_size=64",)
    said = refusal(small_model, method, *sets)
    assert f"{library} runs" in said
    assert "on an accelerator only, and the device is cpu" in said
    plan = make_plan(open_checkpoint(small_model), load_recipe(method, sets), device="cuda")
    assert plan.method.accelerator


@pytest.mark.parametrize(
    "method",
    ["llmcompressor_w4a16", "gptqmodel_w4a16", "gptqmodel_w2a16", "autoround_w3a16",
     "modelopt_w4a8_awq", "llmcompressor_w4a16_autoround"],
)  # fmt: skip
def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(
    small_model: Path, method: str
) -> None:
    said = refusal(small_model, method)
    assert "group size 128 does not divide 576 (would fit: 64, 32, 16)" in said


UNWRITABLE: list[tuple[str, tuple[str, ...], str]] = [
    ("autoround_nvfp4", ("options.format=auto_gptq",), "auto_gptq does not hold nvfp4"),
    ("autoround_w3a16", ("options.format=auto_awq", "group_size=64"), "does not hold w3a16"),
    ("autoround_gguf_q4_k_m", ("group_size=64",), "assigns groups and layers itself"),
    ("gptqmodel_w8a16", ("options.method=awq",), "4 bits only"),
    (
        "gptqmodel_w8a16",
        ("options.desc_act=true", "options.act_group_aware=true"),
        "exclude each other",
    ),
    ("gptqmodel_w8a16", ("kv_cache=fp8",), "cannot quantize the KV cache as fp8"),
    ("llmcompressor_fp8", ("kv_cache=nvfp4",), "cannot quantize the KV cache as nvfp4"),
    ("llmcompressor_w8a8", ("calibration=null",), "needs calibration"),
    ("msmodelslim_w8a8", ("on_nan=keep16",), "on_nan=keep16"),
    ("modelopt_mxfp8", ("overrides=[{match: '*', scheme: fp8}]",), "overrides"),
    ("gptqmodel_w4a16", ("scheme=nvfp4",), "does not write the scheme nvfp4"),
]
"""Method, settings, and what the refusal says."""


@pytest.mark.parametrize(("method", "sets", "telling"), UNWRITABLE)
def test_what_a_library_cannot_write_is_refused(
    small_model: Path, method: str, sets: tuple[str, ...], telling: str
) -> None:
    assert telling in refusal(small_model, method, *sets)


@pytest.mark.parametrize(
    ("method", "change", "telling"),
    [
        ("autoround_w4a16", "options.iters=-1", "options.iters"),
        ("gptqmodel_w4a16", "options.damp_percent=2", "less than 1"),
        ("llmcompressor_w4a16", "options.algorithm=gptqq", "'rtn', 'gptq', 'awq' or 'autoround'"),
        ("msmodelslim_w8a8", "options.practise=x", "Did you mean practice"),
    ],
)
def test_a_wrong_option_is_explained(method: str, change: str, telling: str) -> None:
    with pytest.raises(InputError, match="options") as caught:
        load_recipe(method, (change,))
    assert telling in caught.value.message


def test_a_practice_in_a_file_is_found_from_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("apiversion: modelslim_v1\n")
    monkeypatch.chdir(tmp_path)
    own = load_recipe("msmodelslim_w8a8", ("options.practice=mine.yaml",))
    assert own.options["practice"] == str(tmp_path / "mine.yaml")
    shipped = load_recipe("msmodelslim_w8a8", ("options.practice=default/default-w8a8",))
    assert shipped.options["practice"] == "default/default-w8a8"


def test_a_library_without_its_environment_names_the_command(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    run = quantkit(
        "quantize", small_model, "--method", "msmodelslim_w8a16", "--out", tmp_path / "out"
    )
    refused(run, 3, "hint: quantkit env create msmodelslim")
    assert not (tmp_path / "out").exists()
    rows = {row["method"]: row for row in quantkit("methods", "--json").document["methods"]}
    row = rows["msmodelslim_w8a16"]
    assert row["needs"] == ["environment msmodelslim"]
    assert not row["available"]
    assert "quantkit env create msmodelslim" in row["reason"]


@pytest.mark.parametrize(
    ("family", "method", "telling"),
    [
        ("falcon", "modelopt_fp8", "linear layers of a class of its own"),
        ("falcon", "llmcompressor_fp8_dynamic", "which llmcompressor leaves in 16 bit"),
        ("phi3", "gptqmodel_w4a16", "takes gate_up_proj apart"),
        ("glm4", "gptqmodel_w4a16", "takes gate_up_proj apart"),
        ("lfm2", "autoround_w4a16", "the inputs of the first"),
        ("qwen3_5_text", "autoround_w4a16", "the inputs of the first"),
    ],
)
def test_a_dense_family_that_a_library_cannot_do_is_refused_in_the_plan(
    family: str, method: str, telling: str, tmp_path: Path
) -> None:
    source = model("llama", tmp_path / "source")
    edit_json(source / "config.json", lambda config: config.update(model_type=family))
    asked = (source, "--method", method)
    told = inside("plan", *asked)
    assert told[:2] == (1, "plan.architecture")
    assert telling in told[2]
    assert inside("quantize", *asked, "--out", tmp_path / "out") == told
    assert inside("plan", source, "--method", "rtn_fp8_dynamic")[0] == 0


def test_an_unknown_device_is_refused(small_model: Path, tmp_path: Path) -> None:
    run = quantkit(
        "quantize", small_model, "--method", "modelopt_fp8", "--out", tmp_path / "out",
        "--device", "gpu",
    )  # fmt: skip
    refused(run, 1, "--device gpu is no device", "cuda:N")


def test_every_method_says_what_it_needs() -> None:
    for row in quantkit("methods", "--json").document["methods"]:
        assert row["available"] or row["reason"], row
        assert set(row) >= {"layout", "bits_per_weight", "needs", "engines"}
    assert {"modelopt", "llmcompressor", "gptqmodel", "autoround", "msmodelslim"} <= set(backends())


@pytest.mark.parametrize(
    ("method", "stage"),
    [("llmcompressor_nvfp4", "calibrate"), ("gptqmodel_w8a16", "quantize")],
)
@pytest.mark.library
def test_a_killed_backend_leaves_nothing(
    small_model: Path, tmp_path: Path, method: str, stage: str
) -> None:
    out = tmp_path / "out"
    with alone("out-of-memory"):  # the kernel counts those kills for the whole machine
        run = subprocess.Popen(
            command("quantize", small_model, "--method", method, "--out", out, *QUICK),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith(stage):
                break
        os.kill(_worker_of(run.pid), signal.SIGKILL)
        said = run.stderr.read()
        run.stderr.close()
        assert run.wait() == 3
    assert f"was killed by SIGKILL in stage {stage}" in said
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def _worker_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for _ in range(100):
        found = children.read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.1)
    raise AssertionError("no worker")
