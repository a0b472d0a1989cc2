"""`quantkit validate` as a whole, on real checkpoints of three layers: good, damaged, broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

from quantkit.calibration import build_tokens, load_calibration
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.environments.managed import spec_named
from quantkit.errors import BackendError, InputError
from quantkit.formats.gguf_file import GgufFile, GgufTensor
from quantkit.recipe import load_recipe
from quantkit.schemes import SCHEMES
from quantkit.validate import memory, preflight
from quantkit.validate.builtin import BATCH_TOKENS
from quantkit.validate.cachefile import BaselineCache
from quantkit.validate.data import eval_text, refuse_seen, seen_by_calibration
from quantkit.validate.engines import engine_build
from quantkit.validate.preflight import open_candidate, tokenizer_of
from quantkit.validate.run import ValidateRequest, validate
from quantkit.validate.write import check_reports, write_reports
from quantkit.verify import verify
from tests.cli import Run, quantkit, refused
from tests.damage import DOWN, configuring, dropping, patching
from tests.helpers import cut_layers, edit_json
from tests.rtn import rtn, tiny_moe
from tests.validating import (
    SOBER,
    SWAPS,
    Quiet,
    damaged,
    measured,
    scaled,
    verdicts,
    zero_points,
)


@pytest.fixture(scope="module")
def checkpoints(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """8 and 4 bits, symmetric and with zero points."""
    root = tmp_path_factory.mktemp("checkpoints")
    grouped = {
        bits: SCHEMES[f"w{bits}a16"].with_weight(granularity="group", group_size=64)
        for bits in (8, 4)
    }
    asymmetric = {bits: scheme.with_weight(symmetric=False) for bits, scheme in grouped.items()}
    return {
        "8": rtn(small_model, root / "w8a8", SCHEMES["w8a8_dynamic"]),
        "4": rtn(small_model, root / "w4a16", grouped[4]),
        "8 asymmetric": rtn(small_model, root / "w8a16", asymmetric[8]),
        "4 asymmetric": rtn(small_model, root / "w4a16_asym", asymmetric[4]),
    }


@pytest.fixture(scope="module")
def sealed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of our own, with quantkit.json and card."""
    out = tmp_path_factory.mktemp("sealed") / "w8a8"
    run = quantkit("quantize", small_model, "--method", "rtn_w8a8_dynamic", "--out", out)
    assert run.code == 0, run.err
    return out


@pytest.fixture(scope="module")
def run(
    sealed: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Path]:
    """One whole run of the command, throughput included, and where its reports are."""
    reports = tmp_path_factory.mktemp("reports")
    asked = [word for end in ("json", "md", "xml") for word in ("--report", reports / f"r.{end}")]
    done = quantkit(
        "validate", sealed, "--baseline", small_model, "--samples", "8", "--gate", SOBER,
        "--gate", "memory_ratio<=0.99", *asked, "--json",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    return done, reports


def test_document_says_what_was_measured(run: tuple[Run, Path]) -> None:
    document = run[0].document
    assert document["schema_version"] == 1
    assert document["ok"]
    assert document["engine"]["kernels"] == {"int8_cpu": 21} or document["engine"]["kernels"]
    assert not document["engine"]["weights_only"]
    assert document["text"]["seen_by_calibration"] == 0.0
    found = {gate["metric"]: gate["verdict"] for gate in document["gates"]}
    assert found.pop("mcq_drop") == "undecided"  # 96 answers cannot tell 3 % from nothing
    assert set(found.values()) == {"pass"}
    assert document["undecided"] == 1
    assert {"metric", "limit", "value", "interval", "verdict"} <= document["gates"][0].keys()
    assert 0 < document["metrics"]["kl_mean"]["value"] < 0.05
    assert len(document["windows"]["nll"]) == 8
    assert sum(document["kl_histogram"]["counts"]) == 8 * 511
    assert len(document["canary"]) == 8
    for side in document["throughput"].values():
        assert [row["batch"] for row in side["rows"]] == [1, 8]


def test_reports_say_the_same(run: tuple[Run, Path]) -> None:
    done, reports = run
    assert json.loads((reports / "r.json").read_text()) == done.document
    markdown = (reports / "r.md").read_text()
    assert markdown.startswith("# w8a8: no gate failed, 1 undecided")
    assert "| kl_mean | <=0.05 |" in markdown
    suites = ET.fromstring((reports / "r.xml").read_text())
    cases = suites.findall(".//testcase")
    assert len(cases) == len(done.document["gates"])
    assert not suites.findall(".//failure")
    assert [case.get("name") for case in cases if case.find("skipped") is not None] == [
        "mcq_drop<=0.03"
    ]


def test_numbers_are_in_the_checkpoint_which_still_verifies(
    run: tuple[Run, Path], sealed: Path, small_model: Path
) -> None:
    found = json.loads((sealed / "quantkit.json").read_text())["results"]["validation"]
    assert found["metrics"] == run[0].document["metrics"]
    card = (sealed / "README.md").read_text()
    assert "KL divergence from the baseline, mean" in card
    assert "were not measured" not in card
    assert "no gate failed, 1 undecided." in card
    assert card.count("## Measured") == card.count("## How it was made") == 1
    assert verify(sealed, small_model).ok


def test_baseline_is_not_run_twice(sealed: Path, small_model: Path, run: tuple[Run, Path]) -> None:
    ui = Quiet()
    request = ValidateRequest(sealed, str(small_model), samples=8, throughput=False, gates=(SOBER,))
    report = validate(request, ui)
    assert not [stage for stage in ui.stages if "baseline:" in stage]
    assert "4 measurements of the baseline came from the cache" in report.notes
    again = report.to_json()
    assert again["metrics"]["ppl_ratio"] == run[0].document["metrics"]["ppl_ratio"]


def test_a_damaged_cache_is_measured_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    cache = BaselineCache("model")
    assert cache.value("canary", "q", lambda: [1]) == [1]
    (file,) = cache.folder.iterdir()
    file.write_text("{")
    assert cache.value("canary", "q", lambda: [2]) == [2]
    assert cache.value("canary", "q", lambda: [3]) == [2]


def test_another_build_of_an_engine_has_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    assert engine_build("builtin") == engine_build("transformers") == ""
    with pytest.raises(BackendError, match="not made yet"):
        engine_build("vllm")
    python = spec_named("vllm").python
    python.parent.mkdir(parents=True)
    python.touch()
    assert engine_build("vllm") == spec_named("vllm").path.name


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "scales × 1.5, 8 bits": ("8", scaled("weight_scale")),
    "scales × 1.5, 4 bits": ("4", scaled("weight_scale")),
    **{f"{what} swapped, 8 bits": ("8", swap) for what, swap in SWAPS.items()},
    **{f"{what} swapped, 4 bits": ("4", swap) for what, swap in SWAPS.items()},
    "zero points 16 off, 8 bits": ("8 asymmetric", zero_points(lambda z: z ^ 0x10101010)),
    "zero points 2 off, 4 bits": ("4 asymmetric", zero_points(lambda z: z ^ 0x22222222)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_copy_loads_and_fails_its_gates(
    name: str, checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    which, damage = DAMAGES[name]
    copy = damaged(checkpoints[which], tmp_path / "copy", damage)
    report = measured(copy, small_model)
    found = verdicts(report)
    assert not report.ok
    assert found["weight_sqnr_margin"] == "fail"
    assert report.layers[0].module.split(".")[2] == "1"


@pytest.mark.parametrize("which", ["8", "4", "8 asymmetric", "4 asymmetric"])
def test_undamaged_copy_holds_its_gates(
    which: str, checkpoints: dict[str, Path], small_model: Path
) -> None:
    report = measured(checkpoints[which], small_model, "ppl_ratio<=inf", "mcq_drop<=1")
    assert report.ok, verdicts(report)


def test_weights_only_kernel_satisfies_no_gate_of_quantized_activations(
    checkpoints: dict[str, Path], small_model: Path
) -> None:
    report = measured(checkpoints["8"], small_model, kernel="dequantized")
    assert report.engine["weights_only"]
    assert verdicts(report)["ppl_ratio"] == "undecided"
    assert not report.ok


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_a_layer_of_nothing_but_noise_is_reported(
    checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    """Sums of squares overflow: the SQNR of such a layer has no logarithm."""
    huge = patching(f"{DOWN}.weight_scale", lambda scale: torch.full_like(scale, 1e25))
    copy = damaged(checkpoints["8"], tmp_path / "copy", huge)
    reports = [tmp_path / f"r.{end}" for end in ("md", "xml", "html", "json")]
    done = quantkit(
        "validate", copy, "--baseline", small_model, "--samples", "8", "--no-throughput",
        *(word for report in reports for word in ("--report", report)),
    )  # fmt: skip
    assert done.code == 4, done.out + done.err
    document = json.loads(reports[-1].read_text())
    assert document["layers"][0] == {
        "module": DOWN, "scheme": "w8a8_dynamic", "sqnr_db": -200.0, "floor_db": 16.0,
    }  # fmt: skip
    assert f"`{DOWN}` | w8a8_dynamic | -200.0" in reports[0].read_text()
    assert all(report.stat().st_size for report in reports)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown quantization": (
        configuring(lambda c: c["quantization_config"].update(quant_method="novel")),
        "novel",
    ),
    "missing scale": (dropping(f"{DOWN}.weight_scale"), DOWN),
    "NaN scale": (patching(f"{DOWN}.weight_scale", lambda s: s * torch.nan), "NaN"),
    "other shape": (configuring(lambda c: c.update(intermediate_size=1024)), "intermediate_size"),
    "truncated": (truncate, "truncated"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_refused_before_anything_is_generated(
    name: str, checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    damage, telling = BROKEN[name]
    copy = damaged(checkpoints["8"], tmp_path / "copy", damage)
    ui = Quiet()
    with pytest.raises(InputError) as caught:
        validate(ValidateRequest(copy, str(small_model)), ui)
    assert telling in caught.value.message
    assert set(ui.stages) <= {"verify"}


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"kernel": "nonsense"}, "kernel.unknown"),
        ({"kernel": "int4_cpu"}, "kernel.refused"),
        ({"engine": "transformers", "kernel": "reference"}, "validate.kernel"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_before_any_work(
    more: dict[str, Any], code: str, checkpoints: dict[str, Path], small_model: Path
) -> None:
    ui = Quiet()
    with pytest.raises(InputError) as caught:
        validate(ValidateRequest(checkpoints["8"], str(small_model), device="cpu", **more), ui)
    assert caught.value.code == code
    assert ui.stages == []


def test_a_mixture_of_experts_is_refused_before_any_work(small_model: Path, tmp_path: Path) -> None:
    source = tiny_moe(tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_model / name, source / name)
    held = rtn(source, tmp_path / "w8a8", SCHEMES["w8a8_dynamic"])
    ui = Quiet()
    with pytest.raises(InputError, match="is a mixture of experts"):
        validate(ValidateRequest(held, str(source), device="cpu"), ui)
    assert ui.stages == []


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        ({"recipe": "x"}, "recipe is 'x', not an object"),
        ({"recipe": {"gates": 5}}, "recipe.gates is '5', not a list"),
        ({"recipe": {"gates": [5]}}, "recipe.gates is '[5]', not a list"),
        ({"source": "somewhere"}, "source is 'somewhere', not an object"),
        ({"results": [1]}, "results is '[1]', not an object"),
    ],
)
def test_a_malformed_provenance_is_refused_by_name(
    content: dict[str, Any], telling: str, checkpoints: dict[str, Path], small_model: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    copy = damaged(checkpoints["8"], tmp_path / "copy", lambda _: None)
    (copy / "quantkit.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        open_candidate(copy, str(small_model))
    assert telling in caught.value.message
    (copy / "quantkit.json").write_text(json.dumps({"recipe": None, "source": None}))
    assert open_candidate(copy, str(small_model)).provenance


def test_other_baselines_are_refused(
    checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    held = checkpoints["8"]
    other = cut_layers(small_model, tmp_path / "two", 2)
    refused(quantkit("validate", held, "--baseline", other), 1, "num_hidden_layers is 2, not 3")
    renamed = tmp_path / "renamed"
    shutil.copytree(small_model, renamed)

    def swap(tokenizer: dict[str, Any]) -> None:
        words = tokenizer["model"]["vocab"]
        words["Ġquick"], words["Ġbrown"] = words["Ġbrown"], words["Ġquick"]

    edit_json(renamed / "tokenizer.json", swap)
    refused(quantkit("validate", held, "--baseline", renamed), 1, "different tokenizers")
    refused(quantkit("validate", held, "--baseline", held), 1, "is quantized itself")
    refused(quantkit("validate", held), 1, "does not say which model", "--baseline MODEL")


def test_a_remembered_baseline_is_named_by_its_name_on_the_hub(
    sealed: Path, small_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    copy = Path(shutil.copytree(sealed, tmp_path / "copy"))

    def change(provenance: dict[str, Any]) -> None:
        provenance["source"]["name"] = "org/model"
        provenance["recipe"]["gates"] = ["ppl_ratio<=1e9"]

    edit_json(copy / "quantkit.json", change)
    monkeypatch.setattr(preflight, "resolve_model", lambda name: {"org/model": small_model}[name])
    request = ValidateRequest(copy, gates=(SOBER,), samples=8, throughput=False)
    report = validate(request, Quiet())
    assert report.baseline["name"] == "org/model"
    assert report.warnings == [
        "the recipe's gate ppl_ratio<=1e+09 is looser than the default ppl_ratio<=1.05"
    ]
    sources = {gate.metric: gate.source for gate in report.gates}
    assert sources["ppl_ratio"] == "recipe"
    assert sources["canary_failures"] == "command"


def test_a_baseline_that_leaves_defaults_unstated_is_the_same_architecture(
    checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    stated, unstated = tmp_path / "stated", tmp_path / "unstated"
    shutil.copytree(checkpoints["8"], stated)
    shutil.copytree(small_model, unstated)
    edit_json(stated / "config.json", lambda c: c.update(head_dim=64))
    edit_json(unstated / "config.json", lambda c: c.pop("head_dim", None))
    assert open_candidate(stated, str(unstated)).path == stated
    assert open_candidate(checkpoints["8"], str(small_model))
    assert open_candidate(unstated, str(small_model))
    edit_json(unstated / "config.json", lambda c: c.update(head_dim=32))
    with pytest.raises(InputError, match="head_dim is 32, not 64"):
        open_candidate(stated, str(unstated))
    edit_json(unstated / "config.json", lambda c: c.pop("num_key_value_heads"))
    with pytest.raises(InputError, match="num_key_value_heads is 9, not 3"):
        open_candidate(stated, str(unstated))


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (("--gate", "speed<=1"), "names no metric"),
        (("--report", "r.pdf"), "no report of the kind .pdf"),
        (("--report", "nowhere/r.md"), "nowhere does not exist"),
        (("--report", "/proc/x.json"), "--report /proc/x.json cannot be written"),
        (("--engine", "novel"), "no engine 'novel'"),
        (("--data", "missing.txt"), "missing.txt does not exist"),
        (("--against", "missing.json"), "missing.json cannot be read"),
        (("--tasks", "no_such_task"), "no task 'no_such_task'"),
    ],
)
def test_wrong_requests_are_refused(
    words: tuple[str, ...], telling: str, checkpoints: dict[str, Path], small_model: Path
) -> None:
    refused(quantkit("validate", checkpoints["8"], "--baseline", small_model, *words), 1, telling)


def test_a_report_is_probed_without_leaving_or_losing_anything(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("{}")
    check_reports([old, new])
    assert [file.name for file in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "{}"
    with pytest.raises(InputError, match="cannot be written: No such file"):
        write_reports({}, [tmp_path / "gone" / "r.json"])


def test_memory_is_estimated_before_loading(
    checkpoints: dict[str, Path], small_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 1000 kB\nMemAvailable: 200000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", file)
    ui = Quiet()
    with pytest.raises(InputError, match=r"needs about 0\.\d GB on cpu, where 0\.2 GB are free"):
        validate(ValidateRequest(checkpoints["8"], str(small_model), device="cpu"), ui)
    assert ui.stages == ["verify"]


def test_gguf_is_estimated_as_what_it_is_expanded_to() -> None:
    shapes = {"token_embd.weight": (1000, 64), "blk.0.ffn_down.weight": (64, 256)}
    tensors = {
        name: GgufTensor(name, "Q4_K", shape, shape[0] * shape[1] * 9 // 16, None)
        for name, shape in shapes.items()
    }
    metadata = {"general.architecture": "llama", "llama.feed_forward_length": 256}
    held = GgufFile(Path(), Path("model.gguf"), metadata, tensors)
    batch = BATCH_TOKENS * (2 * 1000 + 12 * 256) + 256 * 12 * 1000
    wanted = 2 * (64_000 + 16_384) + 4 * 64_000 + batch
    assert memory.needed_bytes(held, expanded=False) == wanted


def test_a_failed_allocation_says_what_was_needed() -> None:
    with (
        pytest.raises(BackendError, match=r"DIR ran out of memory; about 2\.0 GB") as caught,
        memory.explained("DIR", 2 * 10**9),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "allocate" in caught.value.message
    with pytest.raises(RuntimeError, match="size of tensor"), memory.explained("DIR", 1):
        torch.zeros(2) + torch.zeros(3)


def test_text_that_calibration_saw_is_refused(
    checkpoints: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    mixture = {"samples": 4, "sequence_length": 512}
    tokens = build_tokens(load_calibration("default", mixture), small_model)
    decode = load_tokenizer(read_tokenizer_info(small_model)).decode
    text = tmp_path / "seen.txt"
    text.write_text("\n".join(decode(row.tolist()) for row in tokens.arrays()[0]))
    candidate = open_candidate(checkpoints["8"], str(small_model))
    seen = eval_text(text, tokenizer_of(small_model), 2, None)
    recipe = load_recipe("modelopt_fp8", tuple(f"calibration.{k}={v}" for k, v in mixture.items()))
    provenance = {
        "calibration": {"digest": tokens.digest},
        "recipe": recipe.model_dump(mode="json"),
    }
    share = seen_by_calibration(seen, provenance, candidate.baseline.path)
    assert share is not None
    assert share > 0.9
    with pytest.raises(InputError, match="was in the calibration of this checkpoint"):
        refuse_seen(seen, share)
    held_out = eval_text(None, tokenizer_of(small_model), 4, None)
    assert seen_by_calibration(held_out, provenance, small_model) == pytest.approx(0, abs=0.01)
    provenance["calibration"] = {"digest": "0" * 64}
    assert seen_by_calibration(held_out, provenance, small_model) is None
    assert seen_by_calibration(held_out, None, small_model) is None
