"""quantkit.json as untrusted input, the plan that it holds, and the plan that a run hands in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.pipeline.seal import file_digests
from quantkit.verification import PlannedLayers, VerifyReport, verify
from tests.support.damage import patch
from tests.support.helpers import edit_json, edit_tensors
from tests.support.rtn import rtn

FP8 = SCHEMES["fp8_dynamic"]
NORM = "model.layers.1.input_layernorm.weight"
KEPT = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def sealed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the parts of quantkit.json that verify reads, made as `seal` makes them."""
    out = rtn(small_model, tmp_path_factory.mktemp("sealed") / "fp8", FP8, keep=[KEPT])
    checkpoint = open_checkpoint(out)
    layers = [name.removesuffix(".weight_scale") for name in checkpoint.tensors
              if name.endswith(".weight_scale")]  # fmt: skip
    document = {
        "schema_version": 1,
        "plan": {"quantized": dict.fromkeys(layers, "fp8_dynamic"), "kept": {KEPT: "override"}},
        "calibration": {"tokens": 1024, "modules": len(layers)},
        "folds": {},
        "tensors": checkpoint.digests(),
        "files": file_digests(out),
    }
    (out / "quantkit.json").write_text(json.dumps(document))
    return out


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    shutil.copytree(sealed, tmp_path / "copy")
    return tmp_path / "copy"


def restated(copy: Path, change: Callable[[dict[str, Any]], object]) -> VerifyReport:
    """Verify after a change to quantkit.json itself."""
    edit_json(copy / "quantkit.json", change)
    return verify(copy)


def test_what_was_sealed_passes(sealed: Path, small_model: Path) -> None:
    assert verify(sealed).ok
    assert verify(sealed, small_model).ok


def test_every_change_since_sealing_is_named(copy: Path) -> None:
    patch(copy, NORM, lambda t: t * 2)
    edit_tensors(copy, lambda t: (t.pop("model.norm.weight"), t.update(extra=torch.ones(1))))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "tokenizer.json").unlink()
    (copy / "notes.txt").write_text("?")
    report = verify(copy)
    where = {(f.code, f.where) for f in report.findings if f.code.startswith("digest.")}
    assert where == {
        ("digest.mismatch", NORM),
        ("digest.missing", "model.norm.weight"),
        ("digest.extra", "extra"),
        ("digest.file_mismatch", "chat_template.jinja"),
        ("digest.file_missing", "tokenizer.json"),
        ("digest.file_extra", "notes.txt"),
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schema_version=99),
        lambda d: d.pop("tensors"),
        lambda d: d.update(tensors={}),
        lambda d: d.update(tensors=["a"]),
        lambda d: d["tensors"].update({NORM: 5}),
        lambda d: d.update(files=None),
        lambda d: d["files"].update({"../../etc/passwd": "0" * 64}),
        lambda d: d.update(plan=[]),
        lambda d: d.update(plan={"quantized": {"a": {"weight": 4}}, "kept": []}),
        lambda d: d.update(folds=[1]),
        lambda d: d.update(calibration="much"),
    ],
)
def test_a_malformed_file_is_a_finding(copy: Path, change: Callable[[Any], object]) -> None:
    assert restated(copy, change).codes() == {"provenance.malformed"}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_what_is_no_json_object_is_a_finding(copy: Path, content: bytes) -> None:
    (copy / "quantkit.json").write_bytes(content)
    assert verify(copy).codes() == {"provenance.malformed"}


def test_calibration_that_saw_nothing(copy: Path) -> None:
    report = restated(copy, lambda d: d.update(calibration={"tokens": 0, "modules": 20}))
    assert report.codes() == {"calibration.never_ran"}


def test_the_stored_plan_is_held(copy: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        plan = document["plan"]
        plan["quantized"][KEPT] = "fp8_dynamic"
        plan["quantized"]["model.layers.0.mlp.up_proj"] = "w4a16"
        del plan["quantized"]["model.layers.0.mlp.down_proj"]

    report = restated(copy, change)
    assert {(f.code, f.where) for f in report.errors} == {
        ("plan.not_quantized", KEPT),
        ("plan.wrong_scheme", "model.layers.0.mlp.up_proj"),
        ("plan.quantized_but_kept", "model.layers.0.mlp.down_proj"),
    }


def planned(directory: Path, scheme: Scheme | str) -> dict[str, Scheme | str]:
    names = json.loads((directory / "quantkit.json").read_text())["plan"]["quantized"]
    return dict.fromkeys(names, scheme)


@pytest.mark.parametrize("scheme", [FP8, "fp8_dynamic"])
def test_the_plan_of_a_run_is_held(sealed: Path, small_model: Path, scheme: Scheme | str) -> None:
    quantized = planned(sealed, scheme)
    plan = PlannedLayers(quantized, frozenset({KEPT}), folds=False)
    assert verify(sealed, small_model, plan).ok
    more = PlannedLayers({**quantized, KEPT: scheme}, frozenset())
    assert verify(sealed, plan=more).codes() == {"plan.not_quantized"}


@pytest.mark.parametrize("scheme", [SCHEMES["fp8"], "fp8", SCHEMES["w8a16"], "fp8_block"])
def test_another_scheme_than_asked_for(sealed: Path, scheme: Scheme | str) -> None:
    report = verify(sealed, plan=PlannedLayers(planned(sealed, scheme), frozenset({KEPT})))
    assert report.codes() == {"plan.wrong_scheme"}


def test_a_scheme_is_compared_with_its_group_size(small_model: Path, tmp_path: Path) -> None:
    int4 = SCHEMES["w4a16"]
    out = rtn(small_model, tmp_path / "w4", int4.with_weight(group_size=64))
    layers = list(verify(out, small_model).layers)
    for scheme, ok in (
        (int4.with_weight(group_size=64), True),
        (int4.with_weight(group_size=32), False),
        ("w4a16", True),
    ):
        quantized = {layer.module: scheme for layer in layers}
        assert verify(out, plan=PlannedLayers(quantized, frozenset())).ok is ok


def test_a_fold_that_the_plan_excludes_is_an_alteration(
    outputs: dict[str, tuple[Path, Path]], small_model: Path
) -> None:
    out, _ = outputs["modelopt_int4_awq"]
    layers = verify(out, small_model).layers
    quantized: dict[str, Scheme | str] = {layer.module: "w4a16" for layer in layers}
    excluded = PlannedLayers(quantized, frozenset(), folds=False)
    assert "ledger.altered" in verify(out, small_model, excluded).codes()
    allowed = PlannedLayers(quantized, frozenset(), folds=True)
    assert verify(out, small_model, allowed).ok
