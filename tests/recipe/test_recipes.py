"""The YAML boundary: what resolves, and that every mistake names file, key, value and choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.backends.registry import load_recipe
from quantkit.errors import InputError
from quantkit.recipe.load import recipe_files


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_every_bundled_recipe_resolves(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name or name in recipe.aliases
    assert recipe.description
    assert recipe.kv_cache == "none"  # an unmeasured KV scale is a trap


def test_a_resolved_recipe_resolves_to_itself(tmp_path: Path) -> None:
    import yaml

    recipe = load_recipe("modelopt_int4_awq", ("group_size=64", "ignore+=re:.*o_proj"))
    stored = tmp_path / "stored.yaml"
    stored.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(str(stored)) == recipe


def test_set_reaches_nested_keys_and_appends() -> None:
    recipe = load_recipe(
        "modelopt_fp8",
        ("calibration.samples=7", "kv_cache=fp8", "ignore+=model.layers.0.*", "seed=3"),
    )
    assert recipe.calibration is not None
    assert recipe.calibration.samples == 7
    assert recipe.kv_cache == "fp8"
    assert recipe.ignore == [
        "@head", "@embeddings", "@routers", "@towers", "@mtp", "model.layers.0.*",
    ]  # fmt: skip
    assert recipe.seed == 3


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ("kv_cash=fp8", ["kv_cash", "'fp8'", "Did you mean kv_cache", "Allowed here"]),
        ("calibration.sample=3", ["calibration.sample", "Did you mean samples"]),
        ("kv_cache=fp7", ["kv_cache", "'fp7'", "'none', 'fp8' or 'nvfp4'"]),
        ("options.iters=5", ["options.iters", "5", "algorithm"]),
        ("scheme=fp9", ["scheme", "'fp9'", "fp8_dynamic"]),
        ("group_size=64", ["group_size=64", "one scale a tensor"]),
        ("ignore+=@gates", ["@gates", "@routers"]),
        ("calibration.samples=-1", ["calibration.samples", "-1", "greater than 0"]),
        ("shard_size=big", ["shard_size", "'big'"]),
        ("kv_cache", ["kv_cache", "KEY=VALUE"]),
        ("seed.a=1", ["seed"]),
        ("backend=modelop", ["modelop"]),
        ("ignore+=re:*", ["ignore", "re:* is no regular expression", "nothing to repeat"]),
        ('targets=["re:("]', ["targets", "re:( is no regular expression"]),
        (
            'overrides=[{"match": "re:(", "scheme": "keep"}]',
            ["overrides.0.match", "re:( is no regular expression"],
        ),
        ("overrides=[{match: '@gates', scheme: keep}]", ["overrides.0.match", "@gates"]),
        ("group_size=true", ["group_size", "True", "whole number"]),
        ("calibration.samples=true", ["calibration.samples", "whole number"]),
        ("seed=false", ["seed", "whole number"]),
        ("group_size=1", ["group_size", "1", "greater than or equal to 8"]),
        ('gates=["ppl_ratio<=inf"]', ["gates", "ppl_ratio<=inf", "holds nothing"]),
        ('gates=["ppl_ratio<=nan"]', ["gates", "ppl_ratio<=nan"]),
        ("ignore=" + "[" * 5000, ["--set ignore", "nests too deeply"]),
    ],
)
def test_a_wrong_change_is_explained(change: str, telling: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("modelopt_fp8", (change,))
    for part in telling:
        assert part in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("- a\n- b\n", "list"),
        ("backend: [unclosed", "cannot be read"),
        ("backend: modelopt\n", "scheme is missing"),
        ("scheme: fp8\nbackend: modelopt\nshceme: fp8\n", "shceme"),
        ("scheme: fp8\nbackend: modelopt\nscheme: int8\n", "scheme stands twice, in lines 1 and 3"),
        ("options: {a: 1, a: 2}\n", "a stands twice"),
        ("[" * 5000, "nests too deeply"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, telling: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(str(file))
    assert telling in caught.value.message
    assert "mine.yaml" in caught.value.message


def test_a_directory_is_called_one(tmp_path: Path) -> None:
    folder = tmp_path / "mine.yaml"
    folder.mkdir()
    with pytest.raises(InputError, match=r"mine\.yaml is a directory"):
        load_recipe(str(folder))


def test_a_close_method_name_is_suggested() -> None:
    with pytest.raises(InputError, match="Did you mean modelopt_fp8"):
        load_recipe("modelopt_fp-8")
