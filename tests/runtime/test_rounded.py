"""A model rounded to nearest while it is loaded: as what the streaming writer makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.linear.activations import global_scale
from quantkit.runtime.linear.kernels import reference
from quantkit.runtime.load import load, load_rounded
from quantkit.runtime.loading.rounded import (
    digest,
    kernels_of,
    round_weight,
    without_calibration,
)
from tests.runtime.test_load import divergence
from tests.support.damage import dropping
from tests.support.families import model
from tests.support.kernels import SHAPES
from tests.support.mixtures import mixture, mxfp4
from tests.support.rtn import fuse_experts, rtn, tiny_moe

pytestmark = pytest.mark.broad

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
INT4 = SCHEMES["w4a16"].with_weight(group_size=64)
WRITTEN = {
    **{name: SCHEMES[name] for name in ("fp8_dynamic", "fp8_block", "w8a8_dynamic", "w8a16",
                                        "nvfp4a16", "mxfp4a16", "mxfp8")},
    "w4a16": INT4,
    "w4a16 asymmetric": INT4.with_weight(symmetric=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model("llama", tmp_path_factory.mktemp("rounded") / "llama")


@pytest.mark.parametrize("name", WRITTEN)
def test_it_computes_what_the_written_checkpoint_does(
    name: str, llama: Path, tmp_path: Path
) -> None:
    held = rtn(llama, tmp_path / "held", WRITTEN[name])
    made = load_rounded(llama, held, device="cpu")
    written = load(held, device="cpu")
    assert torch.equal(made(IDS).logits, written(IDS).logits)
    assert made.kernels() == written.kernels()


@pytest.mark.parametrize("family", ["glm4", "phi3", "gemma2"])
def test_networks_of_transformers_are_rounded_too(family: str, tmp_path: Path) -> None:
    base = model(family, tmp_path / "base")
    held = rtn(base, tmp_path / "held", SCHEMES["fp8_dynamic"])
    made, written = load_rounded(base, held, device="cpu"), load(held, device="cpu")
    assert not made.lean
    assert torch.equal(made(IDS).logits, written(IDS).logits)


@pytest.mark.parametrize("stored", ["one by one", "fused"])
def test_experts_are_found_however_they_are_stored(stored: str, tmp_path: Path) -> None:
    apart = tiny_moe(tmp_path / "apart")
    held = rtn(apart, tmp_path / "held", SCHEMES["nvfp4a16"])
    base = apart if stored == "one by one" else fuse_experts(apart, tmp_path / "fused")
    made = load_rounded(base, held, device="cpu")
    assert torch.equal(made(IDS).logits, load(held, device="cpu")(IDS).logits)


def test_experts_of_a_tensor_with_three_dimensions(tmp_path: Path) -> None:
    base = mixture("gpt_oss", tmp_path / "base")
    held = mxfp4(base, tmp_path / "held")
    made = load_rounded(base, held, device="cpu")
    assert {one.module for one in made.layers} == {one.module for one in load(held).layers}
    exact = load(base, device="cpu")(IDS).logits.float()
    assert 0.01 < float((made(IDS).logits - exact).norm() / exact.norm()) < 0.4


@pytest.mark.parametrize("name", SHAPES)
def test_weights_of_every_format_are_rounded(name: str) -> None:
    scheme, shape = SHAPES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = round_weight(weight, scheme.weight)
    assert tuple(rounded.q.shape) == shape
    assert tuple(rounded.scale.shape) == scheme.weight.scale_shape(shape)
    assert rounded.scale.dtype == torch.float32
    wide, noise = weight.double(), (dequantize(rounded) - weight.float()).double()
    assert 10 * torch.log10((wide**2).sum() / (noise**2).sum()) > scheme.sqnr_floor_db


def test_static_scales_of_activations_are_found_while_it_runs() -> None:
    static = {name: LayerSpec(SCHEMES[name], "", (8, 32)) for name in ("fp8", "nvfp4", "w8a8")}
    for name, spec in static.items():
        given = without_calibration(spec).scheme.input
        assert given is not None
        assert given.dynamic
        assert kernels_of({name: without_calibration(spec)}) == [reference.NAME]
    assert kernels_of({"": LayerSpec(SCHEMES["fp8_dynamic"], "", (8, 32))}) == []
    x = 3000 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert float(global_scale(x)) == pytest.approx(float(x.abs().max()) / (6 * 448))
    assert float(global_scale(torch.zeros(1, 16))) > 0


@pytest.mark.parametrize(
    "name", ["modelopt/fp8_kv", "modelopt/mixed", "modelopt/int8_sq", "llmcompressor/nvfp4"]
)
def test_layers_with_static_scales_are_about_as_exact_without_them(
    name: str, artifact: Callable[[str], Path]
) -> None:
    source, held = artifact(f"{name.partition('/')[0]}/source"), artifact(name)
    exact = load(source, device="cpu")(IDS).logits
    made = load_rounded(source, held, device="cpu")
    assert set(made.kernels()) == {reference.NAME}
    calibrated = divergence(exact, load(held, device="cpu")(IDS).logits)
    assert calibrated / 5 < divergence(exact, made(IDS).logits) < 2 * calibrated


def test_what_the_baseline_does_not_have_is_named(llama: Path, tmp_path: Path) -> None:
    held = rtn(llama, tmp_path / "held", INT4)
    less = Path(shutil.copytree(llama, tmp_path / "less"))
    dropping("model.layers.1.mlp.up_proj.weight")(less)
    with pytest.raises(InputError, match=r"that of model\.layers\.1\.mlp\.up_proj") as caught:
        load_rounded(less, held)
    assert caught.value.code == "runtime.rounded"


def test_a_digest_tells_schemes_and_layers_apart() -> None:
    def layers(scheme: Scheme, *names: str) -> dict[str, LayerSpec]:
        return {name: LayerSpec(scheme, "", (8, 128)) for name in names}

    found = {
        digest(layers(INT4, "a", "b")), digest(layers(INT4, "a")),
        digest(layers(SCHEMES["w4a16"], "a", "b")), digest(layers(SCHEMES["nvfp4"], "a", "b")),
    }  # fmt: skip
    assert len(found) == 4
    assert digest(layers(INT4, "b", "a")) in found
