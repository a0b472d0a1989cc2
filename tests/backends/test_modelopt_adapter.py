"""The ModelOpt adapter with the real library on the shortened real model.

Importing ModelOpt takes longer than the work, so one child quantizes by all methods, one restores
all saved states, and a real worker of its own repeats the first method.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.backends.process.job import Job, Result, token_digest
from quantkit.backends.process.parent import run_worker
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.pipeline.state import check_state, read_state_note, refuse_mismatch
from quantkit.recipe.model import adjusted
from tests.backends.test_worker_process import ADAPTERS, Recorder
from tests.support.helpers import cut_layers

pytestmark = pytest.mark.library

SAMPLES, LENGTH, PADDED = 6, 48, 7
MODELOPT = "quantkit.backends.adapters.modelopt:run"
NOTE = {"model": "base", "fingerprint": "f" * 64, "recipe": {"name": "modelopt_fp8"}}

METHODS: dict[str, dict[str, Any]] = {
    "fp8": {"scheme": "fp8"},
    "nvfp4": {"scheme": "nvfp4"},
    "int8_sq": {"scheme": "w8a8"},
    "int4_awq": {"scheme": "w4a16", "group": 64},
    "fp8_pb_wo": {"scheme": "fp8_block_weight_only"},
    "fp8_kv_fp8": {"scheme": "fp8", "kv_cache": "fp8"},
    "fp8_kv_nvfp4": {"scheme": "fp8", "kv_cache": "nvfp4"},
    "nvfp4_mlp_only": {"scheme": "nvfp4", "only": ".mlp."},
    "fp8_pc_pt": {"scheme": "fp8_dynamic"},
    "w4a16_nvfp4": {"scheme": "nvfp4a16"},
    "mxfp8": {"scheme": "mxfp8"},
    "w4a8_awq": {"scheme": "w4a8_awq", "group": 64},
}
SAVED = ("fp8", "nvfp4", "int8_sq", "int4_awq", "fp8_pb_wo")
WEIGHT_ONLY = ("fp8_pb_wo", "w4a16_nvfp4", "mxfp8")


def linears(model: Path) -> list[str]:
    with safe_open(model / "model.safetensors", "pt") as file:
        return [name[: -len(".weight")] for name in file.keys() if "_proj." in name]  # noqa: SIM118


def changes(method: str, model: Path, folder: Path) -> dict[str, Any]:
    """The fields of a Job that a method sets."""
    choice = METHODS[method]
    scheme = asdict(adjusted(SCHEMES[choice["scheme"]], choice.get("group")))
    layers = [name for name in linears(model) if choice.get("only", "") in name]
    return {
        "method": f"modelopt_{method}",
        "out": str(folder / method),
        "scheme": scheme,
        "layers": dict.fromkeys(layers, scheme),
        "keep": sorted({*linears(model), "lm_head"} - set(layers)),
        "kv_cache": choice.get("kv_cache", "none"),
        "checkpoint_save": str(folder / f"{method}.pth") if method in SAVED else None,
    }


def base_job(model: Path, folder: Path) -> Job:
    return Job(
        task="quantize", backend="modelopt", adapter=MODELOPT, method="modelopt_fp8",
        model=str(model), out=str(folder / "outcomes"), scheme=None,
        tokens=str(folder / "tokens.safetensors"), batch_size=4, checkpoint_note=NOTE,
    )  # fmt: skip


def run(job: Job, report: Recorder | None = None) -> Result:
    log = Path(job.out).with_suffix(".log")
    return run_worker(job, python=Path(sys.executable), log=log, report=report or Recorder())


def run_several(model: Path, folder: Path, jobs: Mapping[str, object]) -> dict[str, Result]:
    """Several jobs in one child; a failure becomes the `error` of its Result."""
    job = asdict(base_job(model, folder))
    job |= {"adapter": "worker_adapters:several", "options": {"adapter": MODELOPT, "jobs": jobs}}
    run(Job.from_json(job))
    outcomes = json.loads((folder / "outcomes" / "outcomes.json").read_text())
    return {name: Result(**outcome) for name, outcome in outcomes.items()}


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """One thread a child: more of them wait for each other longer than such layers take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ADAPTERS))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a token file whose last sample is padded."""
    folder = tmp_path_factory.mktemp("modelopt")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 49_000, (SAMPLES, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -PADDED:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, folder / "tokens.safetensors")
    save_file({"input_ids": ids[:0], "attention_mask": mask[:0]}, folder / "none.safetensors")
    return folder


@pytest.fixture(scope="module")
def quantized(small_model: Path, folder: Path) -> dict[str, Result]:
    """Every method, and the requests that must be refused, in one child."""
    jobs = {method: changes(method, small_model, folder) for method in METHODS}
    for method in WEIGHT_ONLY:
        jobs[method]["tokens"] = None
    fp8 = {**jobs["fp8"], "out": str(folder / "refused"), "checkpoint_save": None}
    some = dict(list(fp8["layers"].items())[3:])
    sample = next(iter(fp8["layers"].values()))
    jobs |= {
        "no tokens": {**fp8, "tokens": str(folder / "none.safetensors")},
        "tokens not given": {**fp8, "tokens": None},
        "absent layer": {**fp8, "layers": {**some, "model.layers.7.mlp.up_proj": sample}},
        "awq on cpu": {
            **fp8,
            "scheme": asdict(SCHEMES["nvfp4"]),
            "options": {"algorithm": "awq_lite"},
        },
    }
    return run_several(small_model, folder, jobs)


@pytest.fixture(scope="module")
def restored(small_model: Path, folder: Path, quantized: dict[str, Result]) -> dict[str, Result]:
    """Every saved state exported again, and states that must be refused, in one child."""
    assert all(quantized[method].error is None for method in SAVED)
    other = cut_layers(small_model, folder / "two-layers", 2)
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "tensors.pth")
    plain_copy(folder / "fp8.pth", folder / "plain.pth")
    states = {method: folder / f"{method}.pth" for method in SAVED} | {
        "plain": folder / "plain.pth", "not modelopt": folder / "tensors.pth",
        "other model": folder / "fp8.pth", "other plan": folder / "fp8.pth",
    }  # fmt: skip
    export: dict[str, Any] = {"task": "export", "tokens": None}
    jobs = {
        name: {**export, "restore": str(file), "out": str(folder / f"re-{name}")}
        for name, file in states.items()
    }
    for method in SAVED:
        jobs[method]["layers"] = changes(method, small_model, folder)["layers"]
    jobs["other model"]["model"] = str(other)
    jobs["other plan"]["layers"] = changes("nvfp4_mlp_only", small_model, folder)["layers"]
    return run_several(small_model, folder, jobs)


def plain_copy(state: Path, target: Path) -> None:
    """The state file without quantkit's note: what `mto.save` alone writes."""
    with zipfile.ZipFile(state) as source, zipfile.ZipFile(target, "w") as copy:
        for record in source.infolist():
            if not record.filename.endswith("/quantkit.json"):
                copy.writestr(record, source.read(record))


def expected_digest(folder: Path) -> str:
    tokens = load_file(folder / "tokens.safetensors")
    ids: list[list[int]] = tokens["input_ids"].tolist()
    return token_digest([*ids[:-1], ids[-1][:-PADDED]])


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_planned_layers_are_quantized(
    quantized: dict[str, Result], small_model: Path, folder: Path, method: str
) -> None:
    assert quantized[method].error is None, quantized[method].error
    tensors = load_file(folder / method / "model.safetensors")
    found = {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")}
    assert found == set(changes(method, small_model, folder)["layers"])
    source = load_file(small_model / "model.safetensors")
    kept = [name for name in source if name.rpartition(".")[0] not in found and "norm" not in name]
    assert "model.embed_tokens.weight" in kept
    assert all(torch.equal(tensors[name], source[name]) for name in kept)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in WEIGHT_ONLY])
def test_the_calibration_is_what_reached_the_model(
    quantized: dict[str, Result], folder: Path, method: str
) -> None:
    calibration = quantized[method].calibration
    assert calibration["digest"] == expected_digest(folder)
    assert (calibration["samples"], calibration["tokens"]) == (SAMPLES, SAMPLES * LENGTH - PADDED)
    assert calibration["passes"] == (2 if "awq" in method else 1)
    layers = {"nvfp4_mlp_only": 9, "fp8_pc_pt": 0}
    assert calibration["modules"] == layers.get(method, 21)
    assert quantized[method].notes == []


def test_methods_say_which_norms_they_rewrite(
    quantized: dict[str, Result], small_model: Path, folder: Path
) -> None:
    source = load_file(small_model / "model.safetensors")
    for method in METHODS:
        tensors = load_file(folder / method / "model.safetensors")
        changed = {
            name.removesuffix(".weight")
            for name in source
            if "norm" in name and not torch.equal(source[name], tensors[name])
        }
        assert set(quantized[method].folds.get("norm", [])) == changed
        assert bool(changed) == ("awq" in method)


@pytest.mark.parametrize("method", ["fp8_kv_fp8", "fp8_kv_nvfp4"])
def test_the_kv_cache_gets_measured_scales(
    quantized: dict[str, Result], folder: Path, method: str
) -> None:
    tensors = load_file(folder / method / "model.safetensors")
    scales = {name: value.item() for name, value in tensors.items() if name[-8:] in KV_SCALES}
    assert len(scales) == 6
    assert all(0 < scale < 1 for scale in scales.values())
    declared = json.loads((folder / method / "hf_quant_config.json").read_text())
    assert declared["quantization"]["kv_cache_quant_algo"] == method.rpartition("_")[2].upper()


KV_SCALES = (".k_scale", ".v_scale")


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("no tokens", "calibration.never_ran"),
        ("tokens not given", "calibration.never_ran"),
        ("absent layer", "worker.layers_absent"),
        ("awq on cpu", "modelopt.needs_cuda"),
    ],
)
def test_what_cannot_be_done_as_asked_is_refused(
    quantized: dict[str, Result], folder: Path, case: str, code: str
) -> None:
    error = quantized[case].error
    assert error is not None
    assert error["code"] == code, error
    assert not (folder / "refused").exists()


def test_the_same_job_gives_the_same_bytes(
    quantized: dict[str, Result], small_model: Path, folder: Path
) -> None:
    report = Recorder()
    job = asdict(base_job(small_model, folder)) | changes("fp8", small_model, folder)
    job |= {"out": str(folder / "again"), "checkpoint_save": str(folder / "again.pth")}
    result = run(Job.from_json(job), report)
    assert result.calibration == quantized["fp8"].calibration
    first, second = (folder / name / "model.safetensors" for name in ("fp8", "again"))
    assert first.read_bytes() == second.read_bytes()
    names = [event[1] for event in report.events if event[0] == "stage"]
    assert names == ["import", "load", "quantize", "calibrate", "save state", "export"]
    assert [e for e in report.events if e[0] == "advance"] == [("advance", 1), ("advance", 2)]
    assert ("stage", "calibrate", 2) in report.events
    assert {"torch", "transformers", "nvidia-modelopt"} <= set(result.versions)
    assert result.peak_rss_bytes > 300 << 20
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("method", SAVED)
def test_a_restored_state_exports_to_the_same_bytes(
    restored: dict[str, Result], folder: Path, method: str
) -> None:
    assert restored[method].error is None, restored[method].error
    for name in ("model.safetensors", "config.json", "hf_quant_config.json"):
        direct, again = folder / method / name, folder / f"re-{method}" / name
        assert direct.read_bytes() == again.read_bytes(), name


def test_a_state_made_elsewhere_exports_too(restored: dict[str, Result], folder: Path) -> None:
    assert read_state_note(folder / "plain.pth") is None
    assert restored["plain"].error is None
    files = [folder / name / "model.safetensors" for name in ("fp8", "re-plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("other model", "state.other_model", "model.layers.2.input_layernorm.weight is not in the"),
        ("other plan", "modelopt.plan_not_followed", "12 too many"),
        ("not modelopt", "state.not_modelopt", "holds no modelopt_state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    restored: dict[str, Result], folder: Path, case: str, code: str, words: str
) -> None:
    error = restored[case].error
    assert error is not None
    assert error["code"] == code
    assert words in error["message"]
    assert not (folder / f"re-{case}").exists()


@pytest.mark.parametrize("method", SAVED)
def test_a_saved_state_is_readable_by_everyone(
    quantized: dict[str, Result], small_model: Path, folder: Path, method: str
) -> None:
    state = folder / f"{method}.pth"
    check_state(state)
    note = read_state_note(state)
    assert note is not None
    assert note["model"] == "base"
    assert note["recipe"] == NOTE["recipe"]
    assert note["calibration"] == quantized[method].calibration
    assert set(note["layers"]) == set(linears(small_model))
    with torch.serialization.safe_globals([slice]):
        objects = torch.load(state, weights_only=True)
    assert set(objects) == {"modelopt_state", "model_state_dict"}


def test_another_base_or_library_is_refused_with_the_difference(
    quantized: dict[str, Result], folder: Path
) -> None:
    state = folder / "fp8.pth"
    note = read_state_note(state)
    assert note is not None

    def refusal(fingerprint: str, version: str) -> InputError:
        with pytest.raises(InputError) as caught:
            refuse_mismatch(
                state, note, model=Path("other"), fingerprint=fingerprint,
                versions={"nvidia-modelopt": version}, library="nvidia-modelopt",
            )  # fmt: skip
        return caught.value

    saved = note["versions"]["nvidia-modelopt"]
    assert refusal("e" * 64, saved).code == "state.other_model"
    error = refusal("f" * 64, "0.1")
    assert error.code == "state.other_library"
    assert saved in error.message
    assert "0.1" in error.message
    assert f"nvidia-modelopt=={saved}" in error.hint
