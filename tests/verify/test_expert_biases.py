"""GPT-OSS: gate and up rows alternate in the source, and biases of all experts are one tensor."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.verification import verify
from tests.support.families import model
from tests.support.helpers import edit_tensors

pytestmark = pytest.mark.library

EXPERT = "model.layers.0.mlp.experts.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny GPT-OSS with biases, and what LLM Compressor makes of it: a layer an expert."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("gpt_oss")
    source = model("gpt_oss", root / "source")

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(1)
        for name in [n for n in tensors if n.endswith("_bias")]:
            tensors[name] = torch.randn_like(tensors[name])

    edit_tensors(source, fill)
    network: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    ignore = ["re:.*lm_head", "re:.*router.*"]
    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=ignore)
    oneshot(model=network, recipe=recipe)
    with warnings.catch_warnings(action="ignore"):  # it says that its modules may be offloaded
        network.save_pretrained(root / "out", save_compressed=True)
    return source, root / "out"


def test_what_a_library_makes_of_it_is_sound(made: tuple[Path, Path]) -> None:
    source, out = made
    report = verify(out, source)
    assert not report.errors, report.errors
    assert report.ledger["kept"] > 4


def test_rows_in_halves_are_read_and_said(made: tuple[Path, Path], tmp_path: Path) -> None:
    """GPTQModel's way: gate_proj has the first half of the alternating rows."""
    source, out = made
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".gate_proj." in n]:
            other = name.replace("gate_proj", "up_proj")
            rows = torch.stack((tensors[name], tensors[other]), dim=1).flatten(0, 1)
            tensors[name], tensors[other] = (half.contiguous() for half in rows.chunk(2))

    edit_tensors(copy, halve)
    report = verify(copy, source)
    assert not report.errors, report.errors
    assert "ledger.halved_rows" in {finding.code for finding in report.findings}


def exchange(first: str, second: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (exchange(f"{EXPERT}.gate_proj.bias", f"{EXPERT}.up_proj.bias"), "ledger.altered"),
        (exchange(f"{EXPERT}.down_proj.bias", f"{EXPERT[:-1]}2.down_proj.bias"), "ledger.altered"),
        (exchange(f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"), "sqnr.below_floor"),
        (lambda tensors: tensors.pop(f"{EXPERT}.down_proj.bias"), "ledger.missing"),
    ],
    ids=["gate and up biases", "two experts' biases", "gate and up", "a bias less"],
)
def test_damage_of_it_is_found(
    change: Callable[[dict[str, torch.Tensor]], None],
    code: str,
    made: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    source, out = made
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    edit_tensors(copy, change)
    assert code in {finding.code for finding in verify(copy, source).errors}
