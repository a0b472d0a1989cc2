"""Mixtures that do not fit together are refused from their headers, and their copies condemned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.cli import inside, said
from tests.support.damage import dropping, patching, replacing, swapping
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors
from tests.support.mixtures import mixture

pytestmark = pytest.mark.broad

BLOCK = "model.layers.1.block_sparse_moe"


def without_expert_everywhere(directory: Path) -> None:
    """In every layer alike, so that no layer lacks what its peers have."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts.2." in name]:
            del tensors[name]

    edit_tensors(directory, change)


def narrower(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for leaf in ("w1", "w3"):
            name = f"{BLOCK}.experts.3.{leaf}.weight"
            tensors[name] = tensors[name][:-32].clone()
        down = f"{BLOCK}.experts.3.w2.weight"
        tensors[down] = tensors[down][:, :-32].clone()

    edit_tensors(directory, change)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "an expert is in no shard": (
        dropping(*(f"{BLOCK}.experts.1.{leaf}.weight" for leaf in ("w1", "w2", "w3"))),
        "complete.missing_expert", "has no expert 1 of 4",
    ),
    "an expert is in no layer": (
        without_expert_everywhere, "complete.missing_expert", "has no expert 2 of 4",
    ),
    "two experts of different shapes": (
        narrower, "complete.expert_shape", "experts.3.w1 is [224, 128]",
    ),
    "a router for another number of experts": (
        replacing(f"{BLOCK}.gate.weight", lambda tensors: torch.ones(8, 128).bfloat16()),
        "complete.router_shape", "gate is [8, 128]",
    ),
    "more experts a token than there are": (
        lambda path: edit_json(path / "config.json", lambda c: c.update(num_experts_per_tok=6)),
        "complete.experts_per_token", "chooses 6 experts a token of 4",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture("mixtral", tmp_path_factory.mktemp("mixtures") / "mixtral")


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    out = source.with_name("quantized")
    code, _, error = inside("quantize", source, "--method", "rtn_fp8_dynamic", "--out", out)
    assert code == 0, error
    return out


@pytest.mark.parametrize("case", DAMAGES)
def test_a_source_that_does_not_fit_together_is_refused_in_the_plan(
    source: Path, tmp_path: Path, case: str
) -> None:
    damage, _, words = DAMAGES[case]
    damaged = copy_checkpoint(source, tmp_path / "m")
    damage(damaged)
    for method in ("rtn_fp8_dynamic", "modelopt_fp8"):
        code, _, error = inside("plan", damaged, "--method", method)
        assert (code, words in error) == (1, True), error


@pytest.mark.parametrize("case", [case for case in DAMAGES if "different shapes" not in case])
def test_the_same_in_a_quantized_checkpoint_is_condemned(
    quantized: Path, tmp_path: Path, case: str
) -> None:
    """Without its quantkit.json, which would know what was written."""
    damage, finding, _ = DAMAGES[case]
    damaged = copy_checkpoint(quantized, tmp_path / "m")
    (damaged / "quantkit.json").unlink()
    assert inside("verify", damaged)[0] == 0
    damage(damaged)
    code, out = said("verify", damaged, "--json")
    assert code == 4
    assert finding in out


EXPERTS = {
    "aria_text": "model.layers.0.mlp.experts",
    "gpt_oss": "model.layers.0.mlp.experts",
    "granitemoe": "model.layers.0.block_sparse_moe.experts",
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_were_taken_apart_are_compared_with_their_part(
    family: str, tmp_path: Path
) -> None:
    """The source holds all of them in one tensor, and gate and up in one."""
    source, out = mixture(family, tmp_path / "source"), tmp_path / "out"
    code, _, error = inside("quantize", source, "--method", "rtn_fp8_dynamic", "--out", out)
    assert code == 0, error
    (out / "quantkit.json").unlink()
    assert inside("verify", out, "--source", source)[0] == 0
    first, second = (f"{EXPERTS[family]}.{number}" for number in (0, 1))
    damages = {
        "gate is up": swapping(f"{first}.gate_proj", f"{first}.up_proj"),
        "one expert is another": swapping(f"{first}.down_proj", f"{second}.down_proj"),
        "a scale": patching(f"{second}.up_proj.weight_scale", lambda scale: scale * 1.5),
    }
    if family == "gpt_oss":
        damages["a bias"] = patching(f"{first}.up_proj.bias", lambda bias: bias + 0.5)
    for name, damage in damages.items():
        damaged = copy_checkpoint(out, tmp_path / name)
        damage(damaged)
        assert inside("verify", damaged, "--source", source)[0] == 4, name
