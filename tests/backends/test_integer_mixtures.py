"""Mixtures through the libraries of integer layouts, AutoRound and GPTQModel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.formats.quantized import examine
from quantkit.formats.registry import detect
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.request import Outcome, Request
from quantkit.runtime.load import load
from quantkit.verification import verify
from tests.support.cli import inside, quantkit, refused
from tests.support.damage import dropping, patching, swapping
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors, merge_shards
from tests.support.in_process import CALIBRATION, Quiet, without_workers
from tests.support.mixtures import mixture
from tests.support.tokenizer import VOCABULARY

pytestmark = [
    pytest.mark.library,
    pytest.mark.filterwarnings("ignore"),  # the libraries' own, in this process
]

SAMPLES, LENGTH = 4, 64
TOKENS = SAMPLES * LENGTH
BLOCK = "model.layers.0.block_sparse_moe"
FIRST, SECOND = f"{BLOCK}.experts.0", f"{BLOCK}.experts.1"
METHODS: dict[str, tuple[str, ...]] = {
    "autoround_w4a16": ("options.iters=1",),
    "gptqmodel_w4a16": (),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture("mixtral", tmp_path_factory.mktemp("mixtures") / "mixtral")


@pytest.fixture(scope="module", params=METHODS)
def outcome(request: pytest.FixtureRequest, source: Path) -> Iterator[Outcome]:
    """A mixture quantized by each method, in files that tests copy."""
    method = str(request.param)
    calibration = source.with_name("quick.yaml")
    calibration.write_text(CALIBRATION)
    sets = (
        f"calibration.name={calibration}", f"calibration.samples={SAMPLES}",
        f"calibration.sequence_length={LENGTH}", "group_size=32", *METHODS[method],
    )  # fmt: skip
    job = Request(str(source), load_recipe(method, sets), source.with_name(method), device="cpu")
    with without_workers():
        yield quantize(job, Quiet())


def test_experts_have_the_names_of_the_checkpoint_and_routers_stay(outcome: Outcome) -> None:
    held = open_checkpoint(outcome.out)
    modules = {name.rpartition(".")[0] for name in held.tensors}
    assert {f"{FIRST}.{leaf}" for leaf in ("w1", "w2", "w3")} <= modules
    assert not any("gate_proj" in name or "gate_up" in name for name in held.tensors)
    assert held.tensors[f"{BLOCK}.gate.weight"].dtype == "BF16"
    declared = examine(held, detect(held)).declaration
    assert f"{BLOCK}.gate" in declared.ignored
    assert not declared.unmatched
    logits = load(outcome.out)(torch.arange(3, VOCABULARY, 9)[None]).logits
    assert logits.isfinite().all()


def test_the_tokens_of_every_expert_are_counted(outcome: Outcome) -> None:
    experts = outcome.provenance.experts
    assert experts is not None
    if outcome.plan.recipe.experts == "all":
        assert {count for block in experts.seen.values() for count in block} == {TOKENS}
    else:
        assert all(sum(block) == 2 * TOKENS for block in experts.seen.values())
    assert f"{BLOCK}.experts" in experts.routed
    assert all(sum(block) == 2 * TOKENS for block in experts.routed.values())


def permute(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith(f"{FIRST}.")]:
        other = SECOND + name[len(FIRST) :]
        tensors[name], tensors[other] = tensors[other], tensors[name]


def duplicate(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith(f"{SECOND}.")]:
        tensors[name] = tensors[FIRST + name[len(SECOND) :]].clone()


def quantized_router(directory: Path) -> None:
    """Four rows in groups of 32, packed as the layers of experts are, and on no list."""

    def pack(tensors: Tensors) -> None:
        columns = tensors.pop(f"{BLOCK}.gate.weight").shape[1]
        tensors[f"{BLOCK}.gate.qweight"] = torch.full((columns // 8, 4), 0x12345678).int()
        tensors[f"{BLOCK}.gate.qzeros"] = torch.full((columns // 32, 1), 0x7777).int()
        tensors[f"{BLOCK}.gate.scales"] = torch.full((columns // 32, 4), 0.01).half()

    edit_tensors(directory, pack)
    for file in ("config.json", "quantize_config.json", "quantization_config.json"):
        if (directory / file).is_file():
            edit_json(directory / file, undeclare)


def undeclare(document: dict[str, object]) -> None:
    settings = document.get("quantization_config", document)
    assert isinstance(settings, dict)
    for key in ("dynamic", "extra_config"):
        listed = settings.get(key) or {}
        settings[key] = {n: v for n, v in listed.items() if BLOCK not in n.replace("\\", "")}


DAMAGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "one expert with another's weights": (lambda d: edit_tensors(d, duplicate), False),
    "w1 and w3 exchanged": (swapping(f"{FIRST}.w1", f"{FIRST}.w3"), False),
    "a scale × 1.5": (patching(f"{FIRST}.w1.scales", lambda t: t * 1.5), False),
    "an expert left out": (dropping(f"{SECOND}."), True),
    "a router quantized": (quantized_router, True),
    "experts permuted against the router": (lambda d: edit_tensors(d, permute), False),
}
"""What is done to the checkpoint, and whether its own files tell."""


def test_damaged_experts_are_found(outcome: Outcome, source: Path, tmp_path: Path) -> None:
    whole = merge_shards(copy_checkpoint(outcome.out, tmp_path / "whole"))
    (whole / "quantkit.json").unlink()  # it has digests, which would find everything
    assert verify(whole, source).ok
    for name, (damage, tells_itself) in DAMAGES.items():
        broken = copy_checkpoint(whole, tmp_path / name)
        damage(broken)
        assert not verify(broken, source).ok, name
        assert not (tells_itself and verify(broken).ok), name


@pytest.mark.slow
def test_msmodelslim_counts_the_tokens_of_experts_too(source: Path, tmp_path: Path) -> None:
    settings = (f"calibration.name={tmp_path / 'quick.yaml'}", f"calibration.samples={SAMPLES}",
                f"calibration.sequence_length={LENGTH}")  # fmt: skip
    (tmp_path / "quick.yaml").write_text(CALIBRATION)
    asked = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "out"
    run = quantkit("quantize", source, "--method", "msmodelslim_w8a8", "--out", out, *asked)
    assert run.code == 0, run.err
    experts = json.loads((out / "quantkit.json").read_text())["experts"]
    assert all(sum(block) == 2 * TOKENS for block in experts["seen"].values())
    refusal = quantkit("plan", source, "--method", "msmodelslim_w4a4_dynamic")
    refused(refusal, 1, "quantizes no mixture by W4A4_DYNAMIC")


def test_what_the_libraries_cannot_do_is_refused_in_the_plan(source: Path) -> None:
    told = inside("plan", source, "--method", "autoround_w4a16", "--set", "experts=all")
    assert told[:2] == (1, "plan.architecture")
    assert "cannot bring every token to every expert of mixtral" in told[2]
    for method in METHODS:
        told = inside("plan", source, "--method", method, "--set", "on_unseen=keep16")
        assert told[0] == 1
        assert "on_unseen=keep16 is not supported" in told[2]
