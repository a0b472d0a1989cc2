"""`--method auto`: what it finds keeps the budget, loads, and is an ordinary recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.recipe.load import read_recipe
from tests.support.cli import inside, said
from tests.support.tiny import byte_llama

pytestmark = pytest.mark.broad

BUDGET = (
    "--set", "schemes=[w4a16:64,fp8_dynamic]", "--set", "samples=2", "--engine", "vllm",
    "--gpu", "h100",
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_llama(tmp_path_factory.mktemp("model") / "llama", hidden=128, wide=256)


@pytest.fixture(scope="module")
def found(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("auto") / "found"
    code, told = said(
        "quantize", llama, "--method", "auto", "--set", "target_bits=5.4", *BUDGET,
        "--out", out,
    )  # fmt: skip
    assert code == 0, told
    assert "found.recipe.yaml" in told
    return out


def test_it_keeps_the_budget_with_the_best_of_what_was_measured(found: Path) -> None:
    document: dict[str, Any] = json.loads(found.with_name("found.search.json").read_text())
    winner, candidates = document["winner"], document["candidates"]
    assert len(candidates) == 3
    assert all(one["bits_per_weight"] <= 5.4 for one in candidates)
    assert winner["kl"] == min(one["kl"] for one in candidates)
    assert set(winner["groups"]) == {"w4a16:64", "fp8_dynamic"}
    assert not found.with_name("found.search").exists()


def test_its_recipe_makes_the_same_bytes(found: Path, llama: Path, tmp_path: Path) -> None:
    recipe = found.with_name("found.recipe.yaml")
    resolved, _ = read_recipe(str(recipe))
    assert resolved.serve.engines == ["vllm"]
    out = tmp_path / "again"
    code, told = said("quantize", llama, "--recipe", recipe, "--out", out)
    assert code == 0, told
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (found / name).read_bytes()


def test_what_is_there_is_not_overwritten(found: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "x.recipe.yaml").write_text("mine")
    words = ("quantize", llama, "--method", "auto", "--set", "target_bits=5.4", *BUDGET)
    assert inside(*words, "--out", tmp_path / "x")[1] == "search.exists"
    assert inside(*words, "--out", found)[1] == "output.exists"
    assert (tmp_path / "x.recipe.yaml").read_text() == "mine"


def test_a_limit_of_kl_gives_the_smallest_that_keeps_it(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("quantize", llama, "--method", "auto", *BUDGET, "--out", out)
    assert inside(*words, "--set", "max_kl=0.5")[0] == 0
    document: dict[str, Any] = json.loads(out.with_name("out.search.json").read_text())
    assert document["winner"]["kl"] <= 0.5
    assert document["winner"]["groups"] == {"w4a16:64": 8}
    end = inside(*words, "--overwrite", "--set", "max_kl=1e-12")
    assert end[1] == "search.unreachable"
    assert "the nearest measured is" in end[2]
    assert (out / "quantkit.json").is_file()


@pytest.mark.parametrize(
    ("sets", "code", "telling"),
    [
        (["target_bits=3"], "search.unreachable", "4.250 bits a weight"),
        (["max_bytes=100KB"], "search.unreachable", "a checkpoint of"),
        (["target_bits=16"], "search.nothing_to_do", "16 bit"),
        (["target_bits=5", "group_size=32"], "search.own_key", "group_size"),
        (["target_bits=5", "schemes=[w3a16]"], "search.unwritten", "w3a16"),
        (["target_bits=5", "schemes=[w4a17]"], "search.unknown_scheme", "w4a17"),
        (["target_bits=5", "kv_cache=fp8"], "plan.refused", "KV cache"),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_work(
    sets: list[str], code: str, telling: str, llama: Path, tmp_path: Path
) -> None:
    asked = [word for change in sets for word in ("--set", change)]
    before = BUDGET if not any("schemes" in change for change in sets) else BUDGET[2:]
    end = inside("quantize", llama, "--method", "auto", *before, *asked, "--out",
                 tmp_path / "out")  # fmt: skip
    assert end[1] == code, end
    assert telling in end[2]
    assert list(tmp_path.iterdir()) == []


def test_schemes_that_the_gpu_does_not_run_are_left_out(llama: Path, tmp_path: Path) -> None:
    end = inside(
        "quantize", llama, "--method", "auto", "--set", "target_bits=8.5", "--engine", "vllm",
        "--gpu", "910b", "--set", "schemes=[nvfp4a16]", "--out", tmp_path / "out",
    )  # fmt: skip
    assert end[1] == "search.nothing_loads", end
