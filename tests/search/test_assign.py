"""The integer program against all assignments, and assignments as recipes."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest

from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.network.patterns import matches
from quantkit.errors import InputError
from quantkit.recipe.load import read_recipe
from quantkit.validation.search.assign import Choice, least_bits, least_kl, totals, with_kept
from quantkit.validation.search.budget import split_changes
from quantkit.validation.search.groups import KEPT, Group, schemes_named
from quantkit.validation.search.recipe import recipe_of, write_recipe

GROUPS = [f"g{number}" for number in range(6)]


def choices(seed: int) -> list[Choice]:
    dice = random.Random(seed)
    found = [
        Choice(group, scheme, dice.random() / bits, bits * 100.0)
        for group in GROUPS
        for scheme, bits in (("four", 4), ("eight", 8))
    ]
    return with_kept(found, dict.fromkeys(GROUPS, 100))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2400.0, 3000.0, 4400.0, 9600.0])
def test_the_least_kl_is_that_of_all_assignments(seed: int, bits: float) -> None:
    given = choices(seed)
    every = (dict(zip(GROUPS, names, strict=True))
             for names in product(("four", "eight", KEPT), repeat=len(GROUPS)))  # fmt: skip
    sums = [totals(given, one) for one in every]
    least = min(one.kl for one in sums if one.bits <= bits)
    found = least_kl(given, bits)
    assert found is not None
    reached = totals(given, found)
    assert reached.bits <= bits
    assert reached.kl == pytest.approx(least, abs=1e-9)
    smallest = least_bits(given, least)
    assert smallest is not None
    assert totals(given, smallest).bits <= reached.bits


def test_neighbours_differ_and_cost_more() -> None:
    given = choices(1)
    first = least_kl(given, 4400.0)
    assert first is not None
    second = least_kl(given, 4400.0, [first])
    assert second is not None
    assert second != first
    assert totals(given, second).kl >= totals(given, first).kl
    assert least_kl(given, 2300.0) is None


def module(name: str, rows: int = 64) -> Module:
    return Module(name, "linear", f"{name}.weight", (rows, 128))


def test_an_assignment_becomes_a_recipe_that_names_exactly_its_modules(tmp_path: Path) -> None:
    groups = [
        Group(f"model.layers.{n}.self_attn.qkv_proj",
              tuple(module(f"model.layers.{n}.self_attn.{leaf}_proj") for leaf in "qkv"))
        for n in (1, 2, 11, 12)
    ] + [
        Group("model.layers.1.mlp.experts",
              tuple(module(f"model.layers.1.mlp.experts.{e}.up_proj") for e in range(12)), True)
    ]  # fmt: skip
    schemes = {group.name: schemes_named(["w4a16:32", "fp8_dynamic"]) for group in groups}
    titles = ["fp8_dynamic", KEPT, "fp8_dynamic", "fp8_dynamic", "w4a16:32"]
    assignment = dict(zip([group.name for group in groups], titles, strict=True))
    recipe = recipe_of("found", {"gates": ["kl_mean<=1"]}, groups, schemes, assignment)
    file = tmp_path / "found.yaml"
    write_recipe(recipe, file, ["one line"])
    again, _ = read_recipe(str(file))
    assert again == recipe
    assert file.read_text().startswith("# one line\n")
    for group, title in zip(groups, titles, strict=True):
        for one in group.modules:
            own = (recipe.scheme, recipe.group_size)
            chosen = next(((o.scheme, o.group_size) for o in recipe.overrides
                           if matches(one.name, o.match)), own)  # fmt: skip
            assert chosen == {"fp8_dynamic": ("fp8_dynamic", None), KEPT: (KEPT, None),
                              "w4a16:32": ("w4a16", 32)}[title]  # fmt: skip
    assert len(recipe.overrides) == 6


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ([], "search.target"),
        (["target_bits=5", "max_kl=0.1"], "search.target"),
        (["target_bits=many"], "search.target"),
        (["target_bits=-4"], "search.target"),
        (["max_kl=true"], "search.target"),
        (["max_kl=nan"], "search.target"),
        (["max_kl=inf"], "search.target"),
        (["max_bytes=huge"], "request.size"),
        (["target_bits=5", "schemes=3"], "search.target"),
    ],
)
def test_a_target_that_is_none_is_refused(changes: list[str], code: str) -> None:
    with pytest.raises(InputError) as caught:
        split_changes(changes)
    assert caught.value.code == code


def test_the_search_takes_its_own_keys_and_leaves_the_rest() -> None:
    budget, rest = split_changes(
        ["max_bytes=2MB", "ignore+=*.o_proj", "schemes=[w4a16, w8a16]", "samples=4"]
    )
    assert (budget.max_bytes, budget.schemes, budget.samples) == (2_000_000, ("w4a16", "w8a16"), 4)
    assert rest == ["ignore+=*.o_proj"]
    assert budget.described == "max_bytes=2000000"
    assert split_changes(["max_kl=1e-3"])[0].max_kl == 0.001
