"""A 16-bit checkpoint rounded while it loads: what the engine's online method makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.engines.gpus import gpu_named
from quantkit.engines.online import online_named, refuse_gpu
from quantkit.errors import InputError
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.load import load
from quantkit.runtime.loading.online import OnlineLayers
from tests.support.rtn import rtn

pytestmark = pytest.mark.broad

LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("fp8_per_channel", "fp8_dynamic"), ("sglang:fp8", "fp8_dynamic"), ("mxfp8", "mxfp8")],
)
def test_it_computes_what_the_same_rounding_offline_does(
    name: str, scheme: str, small_model: Path, tmp_path: Path
) -> None:
    """Scales are float32 there and of the weights' dtype in a file, so that codes at a tie differ;
    powers of two are the same in both."""
    made = rtn(small_model, tmp_path / "made", SCHEMES[scheme])
    online = load(small_model, device="cpu", online=online_named(name))
    offline, plain = (load(path, device="cpu") for path in (made, small_model))
    assert {one.module for one in online.layers} == {one.module for one in offline.layers}
    assert online.kernels() == offline.kernels()
    ids = torch.arange(48)[None]
    found, wanted, base = (model(ids).logits.float() for model in (online, offline, plain))
    if scheme == "mxfp8":
        assert torch.equal(found, wanted)
    far = float((found - base).norm() / (wanted - base).norm())
    assert 0.6 < far < 1.6


def test_one_scale_a_merged_tensor_and_one_a_token() -> None:
    fp8 = online_named("fp8")
    assert fp8.flags == {"--quantization": "fp8"}
    weight = torch.randn(96, 64).bfloat16()
    rounded = OnlineLayers(fp8.scheme, frozenset([LAYER])).rounded(LAYER, weight)
    assert rounded.scale.shape == (1, 1)
    assert float(rounded.scale) == float(weight.float().abs().max() / 448)
    assert (dequantize(rounded) - weight.float()).norm() < 0.04 * weight.float().norm()
    assert fp8.scheme.input == SCHEMES["fp8_dynamic"].input


def test_what_cannot_be_rounded_is_refused_by_name(small_model: Path, tmp_path: Path) -> None:
    made = rtn(small_model, tmp_path / "made", SCHEMES["fp8_dynamic"])
    cases = (
        (made, "fp8", "online.offline"),
        (small_model, "int8_per_channel_weight_only", "online.nothing"),
    )
    for path, name, code in cases:
        with pytest.raises(InputError) as caught:
            load(path, device="cpu", online=online_named(name))
        assert caught.value.code == code
    sglang, hopper = online_named("sglang:mxfp8"), gpu_named("h200")
    with pytest.raises(InputError, match="from compute capability 10 on; H200 has 9") as caught:
        refuse_gpu(sglang, hopper)
    assert "fp8" in caught.value.hint
    for method, gpu in ((online_named("mxfp8"), hopper), (sglang, gpu_named("b200"))):
        refuse_gpu(method, gpu)
    for name, code in (
        ("sglang:int4wo-128", "online.gone"),
        ("sglang:quark_int4fp8_moe", "online.not_computed"),
        ("sglang:fp8_per_block", "online.unknown"),
    ):
        with pytest.raises(InputError) as caught:
            online_named(name)
        assert caught.value.code == code
