"""The five ModelOpt methods through the real command line on real weights."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import yaml

from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from tests.support.cli import METHODS, QUICK, quantkit
from tests.support.helpers import edit_tensors

pytestmark = pytest.mark.library


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    return one.digests() == other.digests()


@pytest.mark.parametrize("method", METHODS)
def test_the_output_verifies_with_and_without_its_provenance(
    outputs: dict[str, tuple[Path, Path]], small_model: Path, method: str, tmp_path: Path
) -> None:
    import shutil

    out, _ = outputs[method]
    assert quantkit("verify", out).code == 0
    bare = tmp_path / "bare"
    shutil.copytree(out, bare)
    (bare / "quantkit.json").unlink()
    run = quantkit("verify", bare, "--source", small_model, "--json")
    assert run.code == 0, run.out
    assert not [f for f in run.document["findings"] if f["severity"] == "error"]


def test_what_a_checkpoint_holds(outputs: dict[str, tuple[Path, Path]], small_model: Path) -> None:
    out, _ = outputs["modelopt_fp8"]
    names = {path.name for path in out.iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "hf_quant_config.json", "model.safetensors", "quantkit.json", "quantkit.log",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_algo"] == "FP8"
    assert config == json.loads((small_model / "config.json").read_text())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (small_model / name).read_bytes()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in out.iterdir())
    note = json.loads((out / "quantkit.json").read_text())
    assert note["calibration"]["tokens"] == 8 * 128
    assert set(note["tensors"]) == set(open_checkpoint(out).tensors)
    assert str(out.parent) not in json.dumps(note)


def test_the_card_has_front_matter_and_measured_numbers(
    outputs: dict[str, tuple[Path, Path]],
) -> None:
    card = (outputs["modelopt_fp8"][0] / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["base_model_relation"] == "quantized"
    assert "Transformers ignores" in card
    note = json.loads((outputs["modelopt_fp8"][0] / "quantkit.json").read_text())
    assert f"{note['results']['weight_sqnr_db']['mean']:.1f} dB" in card


def test_export_only_is_said_in_card_and_plan(
    outputs: dict[str, tuple[Path, Path]], small_model: Path
) -> None:
    assert "export only" in (outputs["modelopt_int8_sq"][0] / "README.md").read_text()
    plan = quantkit("plan", small_model, "--method", "modelopt_int8_sq", "--json").document
    assert plan["export_only"]
    methods = quantkit("methods", "--json").document["methods"]
    assert {row["method"]: row["export_only"] for row in methods}["modelopt_int4_awq"]


def test_sharded_output_has_an_index(small_model: Path, tmp_path: Path) -> None:
    run = quantkit(
        "quantize", small_model, "--method", "modelopt_fp8", "--out", tmp_path / "out",
        "--set", "shard_size=8MB", "--device", "cpu", *QUICK,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert len(open_checkpoint(tmp_path / "out").files) > 1
    assert "next: quantkit verify" in run.out


def test_the_same_input_gives_the_same_tensors(
    outputs: dict[str, tuple[Path, Path]], small_model: Path, tmp_path: Path
) -> None:
    run = quantkit(
        "quantize", small_model, "--method", "modelopt_fp8", "--out", tmp_path / "out", *QUICK
    )
    assert run.code == 0, run.err
    first = open_checkpoint(outputs["modelopt_fp8"][0])
    assert same_tensors(first, open_checkpoint(tmp_path / "out"))


def test_a_damaged_output_is_told_by_its_provenance(
    outputs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(outputs["modelopt_fp8"][0], damaged)

    def flip(tensors: dict) -> None:  # type: ignore[type-arg]
        tensors["model.norm.weight"][0] += 1

    edit_tensors(damaged, flip)
    run = quantkit("verify", damaged)
    assert run.code == 4
    assert "model.norm.weight" in run.out
