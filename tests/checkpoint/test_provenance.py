"""quantkit.json as a typed record: what is written, what is read of it, what is refused."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.checkpoint.provenance import (
    LOG,
    PROVENANCE,
    RESUME_FOLDER,
    Calibration,
    Layers,
    Provenance,
    Results,
    Source,
    Stage,
    WeightSqnr,
    add_validation,
    read,
    write,
)
from quantkit.errors import InputError
from quantkit.pipeline.card import with_measured

DIGEST = "0" * 64
MADE = Provenance(
    schema_version=1,
    quantkit_version="0.1.0",
    method="modelopt_fp8",
    recipe={"name": "modelopt_fp8", "gates": ["ppl_ratio<=1.1"]},
    source=Source("org/model", DIGEST, (("complete.layers", "layer 3"), ("complete.head", None))),
    versions={"torch": "2.8"},
    compute="float32 on avx2",
    seed=0,
    calibration=Calibration(4, 2048, DIGEST, 1, 21, "default", 512),
    plan=Layers({"a": "fp8"}, {"b": "ignored"}),
    folds={"norm": ["n"]},
    stages=(Stage("load", 1.5, 2.5, 100), Stage("stream", 0.5, None, 100)),
    peak_rss_bytes=100,
    notes=("a note – here",),
    results=Results(200, 100, 8.25, WeightSqnr(31.5, 30.25, "a")),
    tensors={"a.weight": DIGEST},
    files={"config.json": DIGEST},
)
DOCUMENT: dict[str, Any] = {
    "schema_version": 1,
    "quantkit_version": "0.1.0",
    "method": "modelopt_fp8",
    "recipe": {"name": "modelopt_fp8", "gates": ["ppl_ratio<=1.1"]},
    "source": {
        "name": "org/model",
        "fingerprint": DIGEST,
        "faults": [
            {"code": "complete.layers", "where": "layer 3"},
            {"code": "complete.head", "where": None},
        ],
    },
    "versions": {"torch": "2.8"},
    "compute": "float32 on avx2",
    "seed": 0,
    "calibration": {
        "samples": 4, "tokens": 2048, "digest": DIGEST, "passes": 1, "modules": 21,
        "name": "default", "sequence_length": 512,
    },
    "plan": {"quantized": {"a": "fp8"}, "kept": {"b": "ignored"}},
    "folds": {"norm": ["n"]},
    "stages": [
        {"name": "load", "seconds": 1.5, "cpu_seconds": 2.5, "peak_rss_bytes": 100},
        {"name": "stream", "seconds": 0.5, "peak_rss_bytes": 100},
    ],
    "peak_rss_bytes": 100,
    "notes": ["a note – here"],
    "results": {
        "source_bytes": 200, "weight_bytes": 100, "bits_per_weight": 8.25,
        "weight_sqnr_db": {"mean": 31.5, "min": 30.25, "worst_layer": "a"},
    },
    "tensors": {"a.weight": DIGEST},
    "files": {"config.json": DIGEST},
}  # fmt: skip
"""Written out: other tools read these names."""


def test_the_file_has_these_keys_and_values_in_this_order(tmp_path: Path) -> None:
    write(tmp_path, MADE)
    text = (tmp_path / PROVENANCE).read_text(encoding="utf-8")
    assert text == json.dumps(DOCUMENT, indent=2, ensure_ascii=False) + "\n"
    assert read(tmp_path) == MADE


def test_what_was_not_measured_is_left_out_but_no_calibration_is_said(tmp_path: Path) -> None:
    least = replace(
        MADE, compute="", calibration=None, folds={}, source=Source("m", DIGEST),
        results=Results(200, 100, 8.25),
    )  # fmt: skip
    document = least.to_json()
    assert "compute" not in document
    assert document["calibration"] is None
    assert document["folds"] == {}
    assert document["source"] == {"name": "m", "fingerprint": DIGEST}
    assert list(document["results"]) == ["source_bytes", "weight_bytes", "bits_per_weight"]
    elsewhere = replace(MADE, calibration=Calibration(name="unknown"))
    assert elsewhere.to_json()["calibration"] == {"name": "unknown", "digest": None}


def test_a_file_without_the_newer_keys_is_read(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    old = {key: DOCUMENT[key] for key in ("schema_version", "source", "plan", "tensors", "files")}
    old["source"] = {"name": "org/model", "fingerprint": DIGEST}
    old["plan"] = {"quantized": {"a": "fp8"}, "kept": ["b"]}
    (tmp_path / PROVENANCE).write_text(json.dumps(old))
    found = read(tmp_path)
    assert found is not None
    assert found.plan == Layers({"a": "fp8"}, {"b": ""})
    assert found.source == Source("org/model", DIGEST)
    assert (found.gates, found.stages, found.calibration) == ((), (), None)
    (tmp_path / PROVENANCE).write_text("{}")
    assert read(tmp_path) == Provenance()


WRONG: dict[str, Any] = {
    "recipe": {"gates": 5},
    "source": {"faults": 5},
    "calibration": {"tokens": "many"},
    "plan": {"quantized": 5},
    "stages": [{"name": "load", "seconds": "long"}],
    "notes": [5],
    "results": {"weight_bytes": "many"},
    "tensors": {"a.weight": "short"},
    "files": {"../../etc/passwd": DIGEST},
}


@pytest.mark.parametrize(("key", "value"), [*((key, [1]) for key in DOCUMENT), *WRONG.items()])
def test_every_damaged_field_is_one_sentence_with_its_name(
    key: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / PROVENANCE).write_text(json.dumps({**DOCUMENT, key: value}))
    with pytest.raises(InputError, match=rf"is malformed: {key}\b") as caught:
        read(tmp_path)
    assert "quantkit verify" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 9999])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_bytes(content)
    with pytest.raises(InputError, match=PROVENANCE):
        read(tmp_path)


def test_a_validation_is_added_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_text(json.dumps({**DOCUMENT, "of a later release": [1]}))
    found = add_validation(tmp_path, {"ok": True})
    document = json.loads((tmp_path / PROVENANCE).read_text())
    assert document == {
        **DOCUMENT,
        "of a later release": [1],
        "results": {**DOCUMENT["results"], "validation": {"ok": True}},
    }
    assert found.results.validation == {"ok": True}
    assert [file.name for file in tmp_path.iterdir()] == [PROVENANCE]


def test_the_card_of_a_file_without_sizes_is_written_without_them() -> None:
    card = "a\n## Measured\nold\n## How it was made\nb"
    assert "size of the weights" in with_measured(card, MADE)
    assert "size of the weights" not in with_measured(card, Provenance())


@pytest.mark.parametrize("name", [PROVENANCE, LOG, RESUME_FOLDER])
def test_a_name_stands_in_one_place(name: str) -> None:
    package = Path(quantkit.__file__).parent
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value == name
    }
    in_a_state = {"backends/process/job.py"} if name == PROVENANCE else set()
    assert found == {"checkpoint/provenance.py"} | in_a_state
