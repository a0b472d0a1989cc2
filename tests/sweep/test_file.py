"""What a sweep's file may say, and the cells that it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.validation.sweep.cell import CellJob
from quantkit.validation.sweep.file import read_sweep
from quantkit.validation.sweep.ray_executor import memory_of
from tests.support.helpers import copy_checkpoint, edit_json


def write(folder: Path, **keys: object) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


def test_cells_are_models_by_recipes_by_settings(small_model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("backend: rtn\nscheme: w8a16\ncalibration: null\n")
    file = write(
        tmp_path,
        models=[str(small_model)],
        recipes=["rtn_w8a16", "own.yaml", {"method": "rtn_w4a16", "set": {"group_size": 32}}],
        settings=[{"set": {"seed": 1}}, {"set": ["seed=2"]}],
        validate={"samples": 4, "gates": ["kl_mean<=0.1"]},
    )
    asked, cells = read_sweep(file)
    assert [cell.recipe for cell in cells] == [
        "rtn_w8a16 seed=1", "rtn_w8a16 seed=2", "own seed=1", "own seed=2",
        "rtn_w4a16 group_size=32 seed=1", "rtn_w4a16 group_size=32 seed=2",
    ]  # fmt: skip
    assert {cell.name for cell in cells} == {small_model.name}
    assert asked.validate_.samples == 4
    assert len({cell.digest for cell in cells}) == 6
    assert read_sweep(file)[1] == cells


def test_a_digest_follows_what_decides_the_result(small_model: Path, tmp_path: Path) -> None:
    def digest(**more: object) -> str:
        keys = {"models": [str(small_model)], "recipes": ["rtn_w8a16"], **more}
        return read_sweep(write(tmp_path, **keys))[1][0].digest

    plain = digest()
    assert digest(settings=[{}]) == plain
    assert digest(recipes=[{"method": "rtn_w8a16", "set": {"seed": 0}}]) == plain
    assert digest(recipes=[{"method": "rtn_w8a16", "set": {"seed": 3}}]) != plain
    assert digest(validate={"samples": 31}) != plain
    text = tmp_path / "text.txt"
    text.write_text("one")
    first = digest(validate={"data": "text.txt"})
    text.write_text("two")
    assert len({plain, first, digest(validate={"data": "text.txt"})}) == 3


def test_a_copy_of_a_model_is_that_model_and_a_changed_one_is_not(
    small_model: Path, tmp_path: Path
) -> None:
    copy = copy_checkpoint(small_model, tmp_path / small_model.name)

    def digest(model: Path) -> str:
        return read_sweep(write(tmp_path, models=[str(model)], recipes=["rtn_w8a16"]))[1][0].digest

    assert digest(copy) == digest(small_model)
    edit_json(copy / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert digest(copy) != digest(small_model)


def test_a_cell_that_is_asked_for_twice_is_one(small_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path, models=[str(small_model)], recipes=["rtn_w8a16", "rtn_w8a16"])
    assert len(read_sweep(file)[1]) == 1


@pytest.mark.parametrize(
    ("keys", "code", "telling"),
    [
        ({"recipe": ["rtn_w8a16"]}, "sweep.invalid", "unknown key recipe"),
        ({"recipes": []}, "sweep.invalid", "recipes"),
        ({"recipes": [{"method": "rtn_w8a16", "sets": {}}]}, "sweep.invalid", "sets"),
        ({"settings": [{"set": {"nothing": 1}}]}, "recipe.invalid", "nothing"),
        ({"validate": {"sample": 4}}, "sweep.invalid", "sample"),
        ({"validate": {"samples": 0}}, "sweep.invalid", "samples"),
        ({"validate": {"gates": ["kl=1"]}}, "", "kl"),
        ({"validate": {"data": "none.txt"}}, "sweep.data", "none.txt"),
        ({"recipes": ["rtn_w8a17"]}, "recipe.unknown_method", "rtn_w8a16"),
        ({"recipes": ["auto"]}, "search.target", "target_bits"),
        ({"models": ["./nowhere"]}, "hub.missing_directory", "nowhere"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(
    keys: dict[str, object], code: str, telling: str, small_model: Path, tmp_path: Path
) -> None:
    given = {"models": [str(small_model)], "recipes": ["rtn_w8a16"], **keys}
    with pytest.raises(InputError, match=telling) as caught:
        read_sweep(write(tmp_path, **given))
    assert code in caught.value.code


def test_ray_is_asked_for_the_memory_that_the_plan_estimates(small_model: Path) -> None:
    def memory(method: str, *sets: str) -> float:
        return memory_of(CellJob("", str(small_model), method, list(sets), 1, device="cpu"))

    weights = open_checkpoint(small_model).weight_bytes
    assert memory("rtn_w8a16") == pytest.approx(weights * 4 / 3)
    assert memory("modelopt_fp8") > 1_400_000_000 + weights
    assert memory("modelopt_fp8", "ignore+=[@linear]") == memory("auto") == memory("rtn_w8a16")
