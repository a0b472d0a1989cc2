"""Mixtures of experts: what Transformers' modules compute, whichever way the experts are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.runtime.load import load
from quantkit.runtime.loading.experts import find_experts
from quantkit.runtime.network.experts import GroupedExperts
from quantkit.runtime.preview import preview
from tests.support.helpers import edit_tensors
from tests.support.mixtures import MIXTURES, expand, mixture, mxfp4
from tests.support.rtn import fuse_experts, rtn

pytestmark = pytest.mark.broad

FP8 = SCHEMES["fp8_dynamic"]
INT4 = SCHEMES["w4a16"].with_weight(group_size=32)
IN_16_BIT = ("dbrx", "jetmoe")
"""Families that round-to-nearest does not quantize the experts of."""
SAMPLE = ("aria_text", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "longcat_flash")
"""Families whose quantized experts are compared in every run; `make soak` compares all."""
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def theirs(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """Transformers' logits."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found.float()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module", params=MIXTURES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's name and a random model of it."""
    path = tmp_path_factory.mktemp("mixture") / request.param
    return request.param, mixture(request.param, path)


def test_logits_are_those_of_transformers(family: Any) -> None:
    _, path = family
    exact = theirs(path, torch.float32)
    assert relative(load(path, dtype="float32")(IDS).logits, exact) < 1e-5
    ours = relative(load(path)(IDS).logits, exact)
    assert ours < 1.3 * relative(theirs(path, torch.bfloat16), exact) + 1e-3


def test_a_cache_may_be_filled_in_pieces(family: Any) -> None:
    _, path = family
    ours = load(path, dtype="float32")
    whole = ours(IDS).logits
    first = ours(IDS[:, :9], use_cache=True)
    second = ours(IDS[:, 9:10], past_key_values=first.past_key_values)
    assert relative(torch.cat((first.logits, second.logits), 1), whole[:, :10]) < 1e-4


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in MIXTURES],
    indirect=True,
)
@pytest.mark.parametrize("scheme", [FP8, INT4], ids=["fp8", "int4"])
def test_quantized_experts_are_those_of_the_dequantized_model(
    family: Any, scheme: Any, tmp_path: Path
) -> None:
    name, path = family
    if name in IN_16_BIT:
        pytest.skip("round-to-nearest leaves these experts in 16 bit")
    made = rtn(path, tmp_path / "made", scheme)
    wanted = theirs(expand(made, path, tmp_path / "expanded"), torch.float32)
    ours = load(made, dtype="float32", kernel="dequantized")
    assert any(".experts." in layer.module for layer in ours.layers)
    assert relative(ours(IDS).logits, wanted) < 1e-2


def test_experts_in_a_quantized_tensor_of_three_dimensions(tmp_path: Path) -> None:
    source = mixture("gpt_oss", tmp_path / "source")
    made = mxfp4(source, tmp_path / "made")
    wanted = theirs(expand(made, source, tmp_path / "expanded"), torch.float32)
    ours = load(made, dtype="float32")
    assert relative(ours(IDS).logits, wanted) < 1e-4
    seen = {record.module for record in preview(made, torch.device("cpu"))}
    assert seen == {layer.module for layer in ours.layers}


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return mixture("qwen3_moe", tmp_path / "qwen")


def test_fused_and_separate_experts_compute_the_same(qwen: Path, tmp_path: Path) -> None:
    fused = fuse_experts(qwen, tmp_path / "fused")
    assert torch.equal(load(fused)(IDS).logits, load(qwen)(IDS).logits)


def test_every_used_expert_is_computed_once(qwen: Path) -> None:
    runtime = load(qwen)
    experts = next(m for m in runtime.modules() if isinstance(m, GroupedExperts))
    given: list[int] = []
    for number, up in enumerate(experts.ups):
        up.register_forward_hook(lambda _m, args, _o, number=number: given.append(number))
    runtime(IDS)
    assert given == sorted(set(given))
    given.clear()
    runtime(IDS[:1, :1])
    assert len(given) == len(set(given)) == 2


def test_an_expert_that_is_missing_or_of_another_shape_is_told(qwen: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_tensors(qwen, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(InputError, match=r"experts\.3\.up_proj") as caught:
        load(qwen)
    assert caught.value.code == "runtime.wrong_shape"
    edit_tensors(qwen, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=r"experts\.3\.up_proj") as caught:
        load(qwen)
    assert caught.value.code == "runtime.missing_tensor"


def test_a_router_of_another_width_is_told(qwen: Path) -> None:
    name = "model.layers.0.mlp.gate.weight"
    edit_tensors(qwen, lambda tensors: tensors.update({name: tensors[name][:3]}))
    with pytest.raises(InputError, match=r"mlp\.gate\.weight has shape"):
        load(qwen)


class Unknown(nn.Module):
    """Experts as no family keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterDict({"w": torch.zeros(4, 8, 8)})
        self.config = hf.MixtralConfig()


def test_experts_that_are_kept_in_another_way_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        find_experts(Unknown())
    assert caught.value.code == "runtime.architecture"
    assert "the experts of mixtral: ParameterDict holds them as w [4, 8, 8]" in caught.value.message
