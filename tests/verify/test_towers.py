"""Checkpoints of models with a vision tower: sound ones pass, damaged ones do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.checkpoint.wrap_vision import wrap_vision
from quantkit.errors import InputError
from quantkit.runtime.load import load
from quantkit.verification import verify
from quantkit.verification.configuration.towers import check_towers
from tests.support.cli import inside
from tests.support.damage import Tensors, dropping, patching
from tests.support.families import model
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors
from tests.support.rtn import rtn
from tests.support.tokenized_towers import FAMILIES, multimodal

pytestmark = pytest.mark.broad

CONNECTOR = "model.connector.modality_projection.proj.weight"
TOWER = "model.vision_model.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def pair(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a tower, and its language model in FP8."""
    root = tmp_path_factory.mktemp("towers")
    source = wrap_vision(small_model, root / "source")
    return source, rtn(source, root / "fp8", SCHEMES["fp8_dynamic"])


@pytest.fixture(scope="module")
def sealed_pair(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `quantkit quantize` publishes it, with its quantkit.json."""
    out = tmp_path_factory.mktemp("sealed") / "fp8"
    assert inside("quantize", pair[0], "--method", "rtn_fp8_dynamic", "--out", out)[0] == 0
    assert verify(out).ok
    return out


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return lambda directory: edit_tensors(directory, change)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "a tower tensor scaled": (patching(TOWER, lambda t: t * 1.5), "ledger.altered", False),
    "another projector": (patching(CONNECTOR, lambda t: t.flip(0)), "ledger.altered", False),
    "no processor's settings": (
        lambda out: (out / "preprocessor_config.json").unlink(), "sidecar.missing", False,
    ),
    "no processor's own": (
        lambda out: (out / "processor_config.json").unlink(), "sidecar.missing", False,
    ),
    "another normalisation of pixels": (
        lambda out: edit_json(out / "preprocessor_config.json",
                              lambda config: config.update(image_mean=[0.4] * 3)),
        "sidecar.changed", False,
    ),
    "no projector": (dropping(CONNECTOR), "ledger.missing", True),
    "no tower": (dropping("model.vision_model"), "ledger.missing", True),
    "another prefix of the language model": (
        rename("model.text_model.", "model.language_model."), "ledger.missing", True,
    ),
}  # fmt: skip
"""What is done to the checkpoint, what is found beside its source, and whether it does not load."""


def test_a_sound_checkpoint_passes_with_and_without_its_source(pair: tuple[Path, Path]) -> None:
    source, out = pair
    assert verify(out, source).codes() == set()
    assert verify(out).codes() == set()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    change, code, unloadable = DAMAGES[damage]
    broken = copy_checkpoint(out, tmp_path / "broken")
    change(broken)
    report = verify(broken, source)
    assert not report.ok
    assert code in report.codes()
    if unloadable:
        with pytest.raises(InputError):
            load(broken)


def test_what_the_config_promises_is_missed_without_a_source(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = copy_checkpoint(pair[1], tmp_path / "broken")
    dropping("model.vision_model", CONNECTOR)(broken)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (broken / name).unlink()
    told = {finding.code for finding in verify(broken).findings}
    assert {"complete.no_tower", "sidecar.no_processor"} <= told


ALONE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no projector": (dropping(CONNECTOR), "complete.no_projector"),
    "no tower": (dropping("model.vision_model"), "complete.missing_tower_layer"),
    "a layer of the tower short": (
        dropping("model.vision_model.encoder.layers.1."), "complete.missing_tower_layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", ALONE)
def test_what_is_missing_is_told_by_the_config_alone(
    damage: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    change, code = ALONE[damage]
    broken = copy_checkpoint(pair[1], tmp_path / "broken")
    change(broken)
    assert verify(broken).codes() == {code}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_quantkit_made_tells_damage_without_its_source(
    damage: str, sealed_pair: Path, tmp_path: Path
) -> None:
    broken = copy_checkpoint(sealed_pair, tmp_path / "broken")
    DAMAGES[damage][0](broken)
    assert not verify(broken).ok


@pytest.mark.parametrize("family", ["gemma4", "llama4", "mllama"])
def test_norms_of_towers_have_sizes_of_their_own(family: str, tmp_path: Path) -> None:
    source = multimodal(family, tmp_path / "source")
    out = rtn(source, tmp_path / "fp8", SCHEMES["fp8_dynamic"])
    assert verify(out).ok


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_towers_of_every_family_are_found_whole(family: str, tmp_path: Path) -> None:
    whole = open_checkpoint(multimodal(family, tmp_path / "source"))
    assert list(check_towers(whole.modules, whole.shapes, whole.config)) == []


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_a_projector_of_another_width_than_the_tower_is_found(family: str, tmp_path: Path) -> None:
    whole = open_checkpoint(model(family, tmp_path / "source"))
    assert list(check_towers(whole.modules, whole.shapes, whole.config)) == []
