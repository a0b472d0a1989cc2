"""What `quantkit validate` refuses before it generates a token, and what it needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from quantkit.backends.environments import room
from quantkit.backends.registry import load_recipe
from quantkit.calibration import build_tokens, load_calibration
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.gguf import GgufFile, GgufTensor
from quantkit.checkpoint.provenance import Calibration, Provenance
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.checkpoint.source_record import remember_source, source_of
from quantkit.errors import BackendError, InputError
from quantkit.validation import memory, preflight
from quantkit.validation.ask.data import eval_text, refuse_seen, seen_by_calibration
from quantkit.validation.ask.health import by_counting, silence
from quantkit.validation.preflight import open_candidate, source_here, tokenizer_of
from quantkit.validation.reports.write import check_reports, write_reports
from quantkit.validation.run import ValidateRequest, validate
from quantkit.validation.subjects.builtin import BATCH_TOKENS
from tests.support.cli import quantkit, refused
from tests.support.damage import DOWN, configuring, dropping, patching
from tests.support.families import SMALL, model
from tests.support.helpers import cut_layers, edit_json, edit_tensors
from tests.support.rtn import rtn
from tests.support.validating import SOBER, Quiet, damaged

pytestmark = pytest.mark.broad


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


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
    assert ".." not in caught.value.message.removesuffix(".")
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


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_any_measurement(
    small_model: Path, tmp_path: Path
) -> None:
    source = model("llama", tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_model / name, source / name)
    held = rtn(source, tmp_path / "w8a8", SCHEMES["w8a8_dynamic"])
    ui = Quiet()
    with pytest.raises(InputError, match=r"gives the id \d+, but the embedding has 128 rows"):
        validate(ValidateRequest(held, str(source), device="cpu", samples=4), ui)
    assert set(ui.stages) <= {"verify", "scan baseline"}


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


@pytest.mark.engine
def test_a_baseline_that_answers_nothing_ends_the_run_before_the_checkpoint(
    checkpoints: dict[str, Path], small_model: Path
) -> None:
    ui = Quiet()
    request = ValidateRequest(checkpoints["8"], str(small_model), samples=8, throughput=False)
    with pytest.raises(
        InputError, match=r"answers nothing: its perplexity is \S+, and counting"
    ) as caught:
        validate(request, ui)
    assert caught.value.code == "validate.broken_baseline"
    assert "--broken-baseline" in caught.value.hint
    assert not [stage for stage in ui.stages if "quantized" in stage or "canary" in stage]


def test_what_answers_nothing_is_no_better_than_counting() -> None:
    windows = np.tile(np.arange(4), (8, 4))
    assert by_counting(windows) == pytest.approx(4, rel=0.01)
    shape = (8, 15)
    assert silence(windows, np.full(shape, -np.log(3.9), np.float32)) is None
    for logprob in (-np.log(4.1), -np.inf, np.nan):
        assert silence(windows, np.full(shape, logprob, np.float32)) is not None


@pytest.mark.engine
def test_a_remembered_baseline_is_named_by_its_name_on_the_hub(
    sealed: Path, small_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    copy = Path(shutil.copytree(sealed, tmp_path / "copy"))

    def change(provenance: dict[str, Any]) -> None:
        provenance["source"]["name"] = "org/model"
        provenance["recipe"]["gates"] = ["ppl_ratio<=1e9"]

    edit_json(copy / "quantkit.json", change)
    monkeypatch.setattr(preflight, "source_of", lambda _: None)  # as on another machine
    monkeypatch.setattr(preflight, "resolve_model", lambda name: {"org/model": small_model}[name])
    request = ValidateRequest(
        copy, gates=(SOBER,), samples=8, throughput=False, broken_baseline=True
    )
    report = validate(request, Quiet())
    assert report.baseline["name"] == "org/model"
    loosened, broken = report.warnings
    assert (
        loosened == "the recipe's gate ppl_ratio<=1e+09 is looser than the default ppl_ratio<=1.05"
    )
    assert broken.startswith("the baseline answers nothing: its perplexity is ")
    sources = {gate.metric: gate.source for gate in report.gates}
    assert sources["ppl_ratio"] == "recipe"
    assert sources["canary_failures"] == "command"


def tiny_talker(small_model: Path, out: Path) -> Path:
    """One narrow layer of random weights, with a real tokenizer."""
    config = hf.LlamaConfig(
        **{
            **SMALL, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16,
            "num_hidden_layers": 1, "vocab_size": 49152, "max_position_embeddings": 1024,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    make: Any = hf.AutoModelForCausalLM.from_config
    make(config, dtype=torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_model / name, out / name)
    return out


@pytest.mark.engine
def test_the_directory_it_was_made_from_is_the_baseline_while_it_holds_that_model(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a copy of the checkpoint, which itself says nothing of the directory."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    source = tiny_talker(small_model, tmp_path / "mine")
    made = tmp_path / "made"
    run = quantkit("quantize", source, "--method", "rtn_w8a8_dynamic", "--out", made)
    assert run.code == 0, run.err
    for file in made.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    held = Path(shutil.copytree(made, tmp_path / "elsewhere" / "copy"))
    shutil.rmtree(made)
    here = source_here(held, Quiet())
    assert here is not None
    assert here[0] == source
    request = ValidateRequest(
        held, gates=(SOBER,), samples=1, throughput=False, broken_baseline=True
    )
    report = validate(request, ui := Quiet())
    assert report.baseline["name"] == "mine"
    assert report.baseline["fingerprint"] == here[1].fingerprint
    assert ui.stages.count("scan baseline") == 1
    assert ui.stages.count("estimate the time") == 1
    assert [note for note in ui.notes if note.startswith("this will take about")] == ui.notes
    assert ui.stages.index("estimate the time") < ui.stages.index("baseline: text")
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert source_here(held, Quiet()) is None
    refused(quantkit("validate", held), 1, "no longer holds the model", "--baseline MODEL")
    shutil.rmtree(source)
    refused(quantkit("validate", held), 1, "does not say which model", "--baseline MODEL")


@pytest.mark.parametrize("content", ["{", "[]", '{"directory": 5}', '{"directory": "/nowhere"}'])
def test_a_damaged_note_of_a_directory_is_none(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    remember_source(tmp_path, "f" * 64)
    assert source_of("f" * 64) == tmp_path
    (note,) = (tmp_path / "sources").iterdir()
    note.write_text(content)
    assert source_of("f" * 64) is None


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
        (("--device", "cuda:0,0"), "names a device twice"),
        (("--engine", "vllm", "--device", "npu:0,1"), "divided over NVIDIA GPUs here"),
        (("--data", "missing.txt"), "missing.txt does not exist"),
        (("--against", "missing.json"), "missing.json cannot be read"),
        pytest.param(
            ("--tasks", "no_such_task"), "no task 'no_such_task'", marks=pytest.mark.library
        ),
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
    monkeypatch.setattr(room, "MEMINFO", file)
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
    provenance = Provenance(
        calibration=Calibration(digest=tokens.digest), recipe=recipe.model_dump(mode="json")
    )
    share = seen_by_calibration(seen, provenance, candidate.baseline.path)
    assert share is not None
    assert share > 0.9
    with pytest.raises(InputError, match="was in the calibration of this checkpoint"):
        refuse_seen(seen, share)
    held_out = eval_text(None, tokenizer_of(small_model), 4, None)
    assert seen_by_calibration(held_out, provenance, small_model) == pytest.approx(0, abs=0.01)
    other = replace(provenance, calibration=Calibration(digest="0" * 64))
    assert seen_by_calibration(held_out, other, small_model) is None
    assert seen_by_calibration(held_out, None, small_model) is None
