"""`import quantkit`: its functions do what the commands do, and cost nothing before a call."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any, assert_type

import pytest
import torch
from typer.main import get_command

import quantkit
from quantkit import ProgressEvent, api
from quantkit.cli.output import Output
from quantkit.errors import CheckError, InputError, QuantkitError, ReportError
from quantkit.pipeline.plan_report import PlanReport
from quantkit.pipeline.push import Pushed
from quantkit.pipeline.request import Outcome
from quantkit.recipe.documents import parse_yaml
from quantkit.recipe.load import as_changes
from quantkit.runtime.model import Runtime
from quantkit.validation.reports.report import Report
from quantkit.validation.search.analyze import Sensitivity
from quantkit.validation.sweep.run import SweepReport
from quantkit.verification import VerifyReport
from tests.support.cli import inside
from tests.support.tiny import byte_llama

ROOT = Path(__file__).parents[2]
FUNCTIONS = ("quantize", "plan", "export", "verify", "validate", "analyze", "sweep", "push", "load")
RETURNED = (Outcome, PlanReport, VerifyReport, Report, Sensitivity, SweepReport, Pushed, Runtime)
SOBER = ["canary_failures<=8", "canary_drift<=100"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that reads bytes."""
    out = tmp_path_factory.mktemp("api") / "llama"
    return byte_llama(out)


@pytest.fixture(scope="module")
def quantized(llama: Path) -> Path:
    out = llama.with_name("w8a16")
    quantkit.quantize(llama, method="rtn_w8a16", out=out, jobs=1)
    return out


def test_importing_costs_the_standard_library_alone() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import quantkit; dir(quantkit)\n"
        "assert not hasattr(quantkit, 'nothing')\n"
        "print(*(m for m in sys.modules if m.startswith('quantkit')))"
    )
    bare = [sys.executable, "-I", "-S", "-c", code, str(ROOT)]
    assert subprocess.run(bare, capture_output=True, text=True, check=True).stdout == "quantkit\n"


def test_the_functions_survive_the_import_of_every_module() -> None:
    """Only a module right below the package could take the name of one."""
    for module in pkgutil.iter_modules(quantkit.__path__, "quantkit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for _ in range(2):
        for name in FUNCTIONS:
            assert getattr(quantkit, name) is getattr(api, name)
            assert name in dir(quantkit)
    assert quantkit.errors.InputError is InputError


def types_are_seen() -> None:
    """Never called: `make types` reads it."""
    assert_type(quantkit.quantize("m", method="x", out="o"), Outcome)
    assert_type(quantkit.plan("m", method="x"), PlanReport)
    assert_type(quantkit.export("s.pth", out="o"), Outcome)
    assert_type(quantkit.verify("o"), VerifyReport)
    assert_type(quantkit.validate("o"), Report)
    assert_type(quantkit.load("o"), Runtime)


def test_the_examples_run(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = llama.with_name("example")

    def run(name: str, *args: str, **more: bool) -> Any:
        space: dict[str, Any] = {"__name__": name}
        exec((ROOT / "examples" / f"{name}.py").read_text(), space)
        return space["main"](*args, **more)

    assert run("quantize_and_verify", str(llama), str(out)) == 0
    assert run("quantize_and_verify", str(llama), str(out)) == 1
    told = capsys.readouterr()
    assert "14 layers" in told.out
    assert "hint: " in told.err
    assert run("validate_with_gate", str(out), str(llama), broken_baseline=True) in (0, 4)
    assert "ppl_ratio<=1.1" in capsys.readouterr().out
    assert run("load_and_generate", str(out), "Hello").startswith("Hello")


def without(value: Any, *keys: str) -> Any:
    """A document without some of its keys."""
    if isinstance(value, dict):
        return {key: without(v, *keys) for key, v in value.items() if key not in keys}
    return [without(v, *keys) for v in value] if isinstance(value, list) else value


CHANGING = ("seconds", "stages", "peak_rss_bytes", "out", "path")
"""What two runs of the same job differ in."""


def same(
    command: list[str | Path], document: dict[str, Any], capsys: Any, code: int = 0, *but: str
) -> None:
    """What the command prints is what the function returned, `but` for some keys."""
    capsys.readouterr()
    assert inside(*command, "--json")[0] == code
    printed = json.loads(capsys.readouterr().out)
    returned = json.loads(json.dumps(document))
    a, b = without(printed, *CHANGING, *but), without(returned, *CHANGING, *but)
    different = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
    assert not different


def test_plan_and_verify_return_what_the_commands_print(
    llama: Path, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"group_size": 32, "ignore+": ["re:.*o_proj"]}
    plan = quantkit.plan(llama, method="rtn_w4a16", set=changes, engine="vllm", tp=[1, 2])
    assert plan.plan.kept.keys() >= {"model.layers.0.self_attn.o_proj"}
    words: list[str | Path] = [
        "plan", llama, "--method", "rtn_w4a16", "--set", "group_size=32", "--set",
        "ignore+=['re:.*o_proj']", "--engine", "vllm", "--tp", "1,2",
    ]  # fmt: skip
    same(words, plan.to_json(), capsys, 0 if plan.served else 1)
    report = quantkit.verify(quantized, source=llama)
    assert report.ok
    same(["verify", quantized, "--source", llama], report.to_json(), capsys)


def test_quantize_returns_what_the_command_prints(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[ProgressEvent] = []
    outcome = quantkit.quantize(
        llama, method="rtn_w8a16", out=tmp_path / "a", jobs=1, progress=events.append
    )
    assert next(event.stage for event in events if event.kind == "stage") == "plan"
    moved = [event for event in events if event.kind == "advance"]
    assert moved
    assert all(event.stage and 0 <= event.done <= event.total for event in moved if event.total)
    document = outcome.to_json()
    assert document["quantkit"] == json.loads((tmp_path / "a" / "quantkit.json").read_text())
    command: list[str | Path] = ["quantize", llama, "--method", "rtn_w8a16", "--jobs", "1"]
    same([*command, "--out", tmp_path / "b"], document, capsys)


def test_validate_returns_what_the_command_prints(
    llama: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = quantkit.validate(
        quantized, baseline=llama, samples=2, gates=SOBER, reports=tmp_path / "r.md",
        throughput=False, broken_baseline=True,
    )  # fmt: skip
    assert (tmp_path / "r.md").is_file()
    recorded = json.loads((quantized / "quantkit.json").read_text())["results"]["validation"]
    assert recorded["metrics"] == report.to_json()["metrics"]
    gates = [word for gate in SOBER for word in ("--gate", gate)]
    command: list[str | Path] = ["validate", quantized, "--baseline", llama, "--samples", "2"]
    command += ["--no-throughput", "--broken-baseline"]
    code = 0 if report.ok else 4
    same(
        [*command, *gates, "--no-throughput", "--broken-baseline"],
        report.to_json(),
        capsys,
        code,
        "notes",
    )


def test_a_report_that_cannot_be_written_keeps_what_was_measured(
    llama: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(document: Any, paths: Any) -> None:
        raise InputError("no room", hint="make room", code="validate.report_unwritable")

    monkeypatch.setattr("quantkit.validation.reports.write.write_reports", full)
    with pytest.raises(ReportError) as raised:
        quantkit.validate(
            quantized, baseline=llama, samples=1, gates=SOBER, throughput=False,
            broken_baseline=True,
        )  # fmt: skip
    assert raised.value.result.gates
    assert raised.value.code == "validate.report_unwritable"


def test_load_generates(quantized: Path) -> None:
    events: list[ProgressEvent] = []
    model = quantkit.load(quantized, device="cpu", dtype="float32", progress=events.append)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] <= 4
    assert {event.stage for event in events} == {"load"}
    assert events[-1].done == events[-1].total == 2
    document = json.loads(json.dumps(model.to_json()))
    assert document["layout"] == "compressed-tensors"
    assert (document["device"], document["dtype"]) == ("cpu", "float32")
    assert len(document["layers"]) == sum(model.kernels().values()) == 14
    assert {layer["scheme"] for layer in document["layers"]} == {"w8a16"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_function_returns_has_a_document(function: str) -> None:
    returned = inspect.signature(getattr(api, function)).return_annotation
    assert callable({c.__name__: c for c in RETURNED}[returned].to_json)


RENAMED = {
    "--gate": "gates", "--report": "reports", "--no-throughput": "throughput",
}  # fmt: skip
ELSEWHERE = {"--json": "to_json", "--dry-run": "plan"}
"""Flags whose work another name of the API does."""


@pytest.mark.parametrize("command", [name for name in FUNCTIONS if name != "load"])
def test_every_flag_of_a_command_is_a_parameter_of_its_function(command: str) -> None:
    from quantkit.cli.app import app

    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    flags = {o for p in found.params for o in p.opts if o.startswith("--")} - {"--help"}
    names = {RENAMED.get(flag, flag[2:].replace("-", "_")) for flag in flags - ELSEWHERE.keys()}
    assert names <= inspect.signature(getattr(api, command)).parameters.keys()


@pytest.mark.parametrize(
    "value",
    [
        "@linear",
        "off",
        "a: b",
        "é😀",
        "",
        "1",
        1,
        0.00001,
        None,
        True,
        ["*x", 1],
        {"a": ["b"]},
        (1,),
    ],
)
def test_values_arrive_as_they_were_given(value: Any) -> None:
    (change,) = as_changes({"options.x": value})
    key, _, text = change.partition("=")
    assert key == "options.x"
    assert parse_yaml(text) == (list(value) if isinstance(value, tuple) else value)


REFUSED: dict[str, dict[str, Any]] = {
    "request.method": {"method": "rtn_w8a16", "recipe": "x.yaml"},
    "recipe.unknown_method": {"method": "rtn_none"},
    "recipe.bad_set": {"method": "rtn_w4a16", "set": {"group_size": object()}},
    "recipe.invalid": {"method": "rtn_w4a16", "set": {"group_sise": 64}},
    "request.size": {"method": "rtn_w8a16", "memory": "much"},
    "request.executor": {"method": "rtn_w8a16", "executor": "moon"},
    "request.count": {"method": "rtn_w8a16", "jobs": -3},
    "output.exists": {"method": "rtn_w8a16"},
}


@pytest.mark.parametrize("code", REFUSED)
def test_bad_requests_are_input_errors(llama: Path, quantized: Path, code: str) -> None:
    with pytest.raises(InputError) as raised:
        quantkit.quantize(llama, out=quantized, **REFUSED[code])
    assert raised.value.code == code
    assert raised.value.hint


@pytest.mark.parametrize("tp", ["x", "0", 0, [1, -2]])
def test_sizes_that_are_none_are_refused(llama: Path, tp: Any) -> None:
    with pytest.raises(InputError, match="tensor-parallel"):
        quantkit.plan(llama, method="rtn_w8a16", tp=tp)


@pytest.mark.parametrize("count", [{"samples": 0}, {"limit": 0}])
def test_counts_that_are_none_are_refused(quantized: Path, count: dict[str, int]) -> None:
    with pytest.raises(InputError, match="less than 1"):
        quantkit.validate(quantized, **count)  # type: ignore[arg-type]


def test_what_a_callback_raises_leaves_nothing_behind(llama: Path, tmp_path: Path) -> None:
    def stop(event: ProgressEvent) -> None:
        if event.stage == "seal":
            raise CheckError("enough", hint="go on", code="test.stop")

    with pytest.raises(QuantkitError, match="enough"):
        quantkit.quantize(llama, method="rtn_w8a16", out=tmp_path / "x", jobs=1, progress=stop)
    assert not (tmp_path / "x").exists()


def test_commands_hand_everything_to_the_api(
    monkeypatch: pytest.MonkeyPatch, llama: Path, tmp_path: Path
) -> None:
    """No command reaches the pipeline by another way: with the API gone, none of them works."""
    words: dict[str, list[str | Path]] = {
        "quantize": [llama, "--method", "rtn_w8a16", "--out", tmp_path / "y"],
        "plan": [llama, "--method", "rtn_w8a16"],
        "export": ["--restore", tmp_path / "s.pth", "--out", tmp_path / "y"],
        "verify": [llama],
        "validate": [llama],
        "analyze": [llama],
        "push": [llama, "someone/llama"],
        "sweep": [tmp_path / "s.yaml", "--out", tmp_path / "y"],
    }

    def caught(*args: Any, **kwargs: Any) -> None:
        raise InputError("caught", hint="none", code="test.caught")

    for name, rest in words.items():
        monkeypatch.setattr(api, name, caught)
        assert inside(name, *rest)[1] == "test.caught"


def test_the_command_line_follows_what_the_callback_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ui = Output()
    ui.follow(ProgressEvent("stage", "scan source", total=4))
    ui.follow(ProgressEvent("advance", "scan source", done=2, total=4))
    ui.follow(ProgressEvent("note", "scan source", note="one layer was skipped"))
    ui.finish()
    assert capsys.readouterr().err == "scan source …\nnote: one layer was skipped\n"
