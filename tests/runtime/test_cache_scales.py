"""A quantized key-value cache in every network that the runtime runs, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.runtime.load import load
from quantkit.runtime.network.cache_rounding import CacheScales, through_fp8, through_nvfp4
from tests.support.families import model
from tests.support.kvcache import INT8, calibrated, with_cache
from tests.support.rtn import rtn, tiny_moe

pytestmark = pytest.mark.broad

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
LAYERS = 2


@pytest.fixture(scope="module", params=["llama", "mixture", "glm4"])
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in 8 bit, of networks of our own and of one that Transformers computes."""
    root = tmp_path_factory.mktemp("held")
    mixed = request.param == "mixture"
    source = tiny_moe(root / "m") if mixed else model(request.param, root / "m")
    return rtn(source, root / "w8a16", SCHEMES["w8a16"])


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def test_keys_and_values_are_rounded_also_without_a_cache(held: Path, tmp_path: Path) -> None:
    scales = calibrated(held, IDS, tmp_path / "work")
    assert scales.keys() == set(range(LAYERS))
    rounded = load(with_cache(held, tmp_path / "cache", scales), device="cpu")
    exact = load(held, device="cpu")(IDS).logits
    found = rounded(IDS).logits
    assert 0 < error(found, exact) < 0.1
    with rounded.cache_in_16_bit():
        assert torch.equal(rounded(IDS).logits, exact)
    assert torch.equal(rounded(IDS).logits, found)
    narrow = {index: (keys / 10, values / 10) for index, (keys, values) in scales.items()}
    worse = load(with_cache(held, tmp_path / "narrow", narrow), device="cpu")
    assert error(worse(IDS).logits, exact) > 2 * error(found, exact)


def test_a_cache_filled_in_pieces_holds_the_same(held: Path, tmp_path: Path) -> None:
    scales = calibrated(held, IDS, tmp_path / "work")
    runtime = load(with_cache(held, tmp_path / "cache", scales), device="cpu", dtype="float32")
    whole = runtime(IDS).logits
    first = runtime(IDS[:, :10], use_cache=True)
    rest = runtime(IDS[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(rest.logits, whole[:, 10:], atol=1e-3, rtol=1e-3)


def test_a_cache_without_any_scale_is_at_1_as_engines_have_it(held: Path, tmp_path: Path) -> None:
    runtime = load(with_cache(held, tmp_path / "none", {}), device="cpu")
    assert runtime.cache_scales == dict.fromkeys(range(LAYERS), CacheScales(1.0, 1.0))
    assert load(held, device="cpu").cache_scales == {}


@pytest.mark.parametrize(
    ("scales", "scheme", "code", "telling"),
    [
        ({0: (0.1, 0.1)}, None, "kv.missing_scale", "layer 1"),
        ({0: (0.1, 0.1), 1: (0.1, float("nan"))}, None, "kv.bad_scale", "v_scale is nan"),
        ({0: (0.1, 0.1), 1: (0.1, 0.1)}, INT8, "runtime.cache", "declares a int8 key-value cache"),
    ],
)
def test_what_is_not_computed_is_refused(
    scales: Any, scheme: Any, code: str, telling: str, held: Path, tmp_path: Path
) -> None:
    broken = with_cache(held, tmp_path / "broken", scales, scheme)
    with pytest.raises(InputError) as caught:
        load(broken, device="cpu")
    assert caught.value.code == code
    assert telling in caught.value.message


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    source = model("deepseek_v3", tmp_path / "m")
    held = rtn(source, tmp_path / "fp8", SCHEMES["fp8_dynamic"])
    with pytest.raises(InputError, match="cache of latent attention"):
        load(with_cache(held, tmp_path / "cache", {}), device="cpu")


def test_what_comes_out_of_a_cache() -> None:
    x = torch.randn(2, 5, 3, 64, generator=torch.Generator().manual_seed(0))
    for rounded, most in ((through_fp8, 0.03), (through_nvfp4, 0.12)):
        found = rounded(x, float(x.abs().max()) / 448)
        assert found.shape == x.shape
        assert 0 < error(found, x) < most
    assert float(through_fp8(x * 1e4, 1.0).max()) == 448
