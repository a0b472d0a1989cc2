"""ModelOpt's AutoQuantize and AutoRound's AutoScheme in the place of our own estimates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.validation.search.analyze import fitting, read_text
from quantkit.validation.search.budget import split_changes
from quantkit.validation.search.groups import fusable_groups, schemes_named
from quantkit.validation.search.scorer import library_scores
from tests.search.test_sensitivity import Quiet
from tests.support.cli import said
from tests.support.tiny import byte_llama

TITLES = ["w4a16:64", "w4a16:32", "fp8_dynamic"]


def test_a_scorer_is_named_and_gives_no_kl() -> None:
    budget, rest = split_changes(["target_bits=5", "options.scorer=modelopt", "seed=1"])
    assert (budget.scorer, rest) == ("modelopt", ["seed=1"])
    assert split_changes(["target_bits=5"])[0].scorer == "fisher"
    for changes in (["target_bits=5", "options.scorer=modelpot"],
                    ["max_kl=0.1", "options.scorer=autoround"]):  # fmt: skip
        with pytest.raises(InputError) as caught:
            split_changes(changes)
        assert caught.value.code == "search.scorer"


@pytest.mark.slow
@pytest.mark.library
@pytest.mark.parametrize("name", ["modelopt", "autoround"])
def test_a_library_scores_every_group(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(byte_llama(tmp_path / "llama", hidden=128, wide=256))
    groups, schemes = fusable_groups(source, "vllm"), schemes_named(TITLES)
    fits = {group.name: fitting(group, schemes) for group in groups}
    fits[groups[0].name].pop("fp8_dynamic")
    found = library_scores(name, source, groups, fits, read_text(source, None, 2), Quiet(),
                           work=tmp_path / "work", device="cpu", seed=0)  # fmt: skip
    assert {group: set(scores) for group, scores in found.items()} == {
        group.name: set(fits[group.name]) for group in groups
    }
    for scores in found.values():
        assert scores["w4a16:64"] > scores["w4a16:32"] > scores.get("fp8_dynamic", 0) >= 0
    assert not (tmp_path / "work.log").exists()


@pytest.mark.slow
@pytest.mark.library
def test_a_search_by_its_scores_keeps_the_budget(tmp_path: Path) -> None:
    llama, out = byte_llama(tmp_path / "llama", hidden=128, wide=256), tmp_path / "found"
    code, told = said(
        "quantize", llama, "--method", "auto", "--set", "target_bits=5.4", "--set", "samples=1",
        "--set", "options.scorer=modelopt", "--set", "schemes=[w4a16:64,fp8_dynamic]",
        "--out", out,
    )  # fmt: skip
    assert code == 0, told
    document = json.loads(out.with_name("found.search.json").read_text())
    assert document["scorer"] == "modelopt"
    assert document["sensitivity"] is None
    assert len(document["scores"]) == 8
    assert document["winner"]["bits_per_weight"] <= 5.4
    assert set(document["winner"]["groups"]) == {"w4a16:64", "fp8_dynamic"}


@pytest.mark.slow
@pytest.mark.library
def test_what_a_library_cannot_score_is_refused(tmp_path: Path) -> None:
    llama = byte_llama(tmp_path / "llama", hidden=128, wide=256)
    code, told = said(
        "quantize", llama, "--method", "auto", "--set", "target_bits=5.4", "--set", "samples=1",
        "--set", "options.scorer=modelopt", "--set", "schemes=[nvfp4a16]",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 1
    assert "modelopt.needs_cuda" in told
