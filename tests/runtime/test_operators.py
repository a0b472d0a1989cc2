"""A network computed by vLLM's CPU operators is the one that is computed without them."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.errors import InputError
from quantkit.runtime.linear.modules import PlainLinear
from quantkit.runtime.load import load
from quantkit.runtime.model import Runtime
from quantkit.runtime.network import decoder
from quantkit.runtime.network.attention_vllm import Operators, TurnedCache, usable
from quantkit.runtime.network.cache_rounding import CacheScales
from quantkit.runtime.network.decoder import Block, Decoder
from quantkit.runtime.network.norm import add_rms_norm, rms_norm
from quantkit.runtime.network.rotary import Rotary, rotate
from quantkit.runtime.vllm_ops import cpu as vllm_operators

pytestmark = [
    pytest.mark.usefixtures("operators"),
    pytest.mark.skipif(
        torch.cpu._is_amx_tile_supported(), reason="their attention is not used with AMX"
    ),
]

NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64, "attention_bias": True},
    "qwen3": {"head_dim": 32},
    "qwen2": {"hidden_size": 320},  # heads of 80, which take 16 positions at once
    "mistral": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 96},
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small random model."""
    path = tmp_path_factory.mktemp("network")
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None,
    }  # fmt: skip
    config = AutoConfig.for_model(request.param, **sizes | NETWORKS[request.param])
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(std=0.1) if weight.dim() > 1 else weight.data.uniform_(0.5, 1.5)
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def model(network: Path) -> Runtime:
    """The model with operators."""
    loaded = load(network)
    assert isinstance(loaded.network, Decoder)
    assert usable(loaded.network.embed, loaded.network.shape.head_dim)
    return loaded


def ids(batch: int, count: int) -> torch.Tensor:
    return torch.randint(3, 300, (batch, count), generator=torch.Generator().manual_seed(count))


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that does not have the operators."""
    monkeypatch.setenv(vllm_operators.SWITCH, "off")
    vllm_operators.missing.cache_clear()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


@torch.inference_mode()
@pytest.mark.parametrize("scales", [None, CacheScales(0.02, 0.015)], ids=["", "fp8 cache"])
def test_logits_are_as_exact_as_without(
    model: Runtime, network: Path, scales: CacheScales | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(runtime: Runtime) -> torch.Tensor:
        for block in runtime.network.blocks:  # type: ignore[union-attr]
            assert isinstance(block, Block)
            block.cache_rule = scales
        result: torch.Tensor = runtime(tokens).logits
        return result

    tokens = ids(3, 70)
    found = logits(model)
    without(monkeypatch)
    exact = logits(load(network, dtype="float32"))
    plain = error(logits(load(network)), exact)
    assert error(found, exact) < 1.3 * plain < 0.1


@torch.inference_mode()
def test_a_cache_is_filled_in_pieces_and_grows(model: Runtime) -> None:
    tokens = ids(3, 90)
    whole = model(tokens).logits
    past = model(tokens[:, :40], use_cache=True).past_key_values
    assert isinstance(past, TurnedCache)
    assert past.capacity == 64
    pieces = [
        model(tokens[:, start:end], past_key_values=past).logits
        for start, end in ((40, 41), (41, 89), (89, 90))
    ]
    assert past.capacity == 128
    assert error(torch.cat(pieces, 1), whole[:, 40:]) < 0.02


@torch.inference_mode()
def test_parts_of_a_batch_and_the_last_positions(
    model: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ids(5, 33)
    whole = model(tokens).logits
    monkeypatch.setattr(decoder, "PART_TOKENS", 70)
    cache = model.network.new_cache(5, 40)
    found = model(tokens[:, :-1], past_key_values=cache, logits_to_keep=2).logits
    assert found.shape[1] == 2
    assert error(found, whole[:, -3:-1]) < 0.02
    monkeypatch.setattr(decoder, "PART_TOKENS", 2)
    last = model(tokens[:, -1:], past_key_values=cache).logits
    assert error(last, whole[:, -1:]) < 0.02


@torch.inference_mode()
def test_padding_changes_no_text(model: Runtime) -> None:
    tokens = ids(3, 20)
    mask = torch.ones_like(tokens)
    mask[0, :11] = mask[2, :3] = 0
    first = model(tokens * mask, mask, use_cache=True)
    mask = torch.cat((mask, mask.new_ones(3, 1)), 1)
    following = torch.full((3, 1), 7)
    second = model(following, mask, first.past_key_values).logits
    for row, skipped in ((0, 11), (1, 0), (2, 3)):
        alone = torch.cat((tokens[row, skipped:], following[row]))[None]
        wanted = model(alone).logits[0]
        assert error(first.logits[row, skipped:], wanted[:-1]) < 0.02
        assert error(second[row], wanted[-1:]) < 0.05  # scores in bfloat16


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "start", "count"),
    [(9, 3, 64, 0, 300), (9, 3, 64, 264, 1), (4, 4, 80, 5, 40), (8, 1, 128, 700, 3)],
)
def test_attention_is_causal_attention(
    heads: int, kv_heads: int, width: int, start: int, count: int
) -> None:
    batch, end = 2, start + count
    generator = torch.Generator().manual_seed(count)
    queries, keys, values = (
        torch.randn(batch, end, number, width, generator=generator).bfloat16()
        for number in (heads, kv_heads, kv_heads)
    )
    cache = TurnedCache(2, (batch, kv_heads, end, width))
    if start:
        cache.extend(1, keys[:, :start].transpose(1, 2), values[:, :start].transpose(1, 2))
        cache.advance(start)
    operators = Operators(cache, torch.empty(0), batch, count, heads)
    found = operators.attend(1, *(x[:, start:] for x in (queries, keys, values)))
    q, k, v = (x.float().transpose(1, 2) for x in (queries, keys, values))
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert error(found, exact.transpose(1, 2)[:, start:].flatten(2)) < 5e-3


def test_rotation_and_residual_norms_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 3, 64, generator=generator).bfloat16()
    config = AutoConfig.for_model("llama", hidden_size=192, num_attention_heads=3)
    rotary = Rotary(config, torch.bfloat16, torch.device("cpu"))
    cache = TurnedCache(1, (2, 3, 32, 64))
    cache.advance(4)
    operators = Operators(cache, rotary.joined(9), 2, 5, 3)
    cos, sin = rotary.tables(9)
    wanted = rotate(x.clone(), cos[4:9], sin[4:9])
    assert error(operators.rotate(x.clone()), wanted) < 4e-3
    hidden, added, weight = x.flatten(2), torch.randn_like(x).flatten(2), torch.rand(192).bfloat16()
    total = hidden.float() + added.float()
    for _ in range(2):
        summed = hidden.clone()
        normed = add_rms_norm(summed, added.clone(), weight, 1e-5)
        assert error(summed, total) < 3e-3
        exact = torch.nn.functional.rms_norm(total, (192,), weight.float(), 1e-5)
        assert error(normed, exact) < 5e-3
        assert error(rms_norm(total.bfloat16(), weight, 1e-5), exact) < 5e-3
        without(monkeypatch)


def test_a_cache_of_another_batch_is_refused(model: Runtime) -> None:
    cache = model.network.new_cache(1, 64)
    with pytest.raises(InputError, match="The cache holds 1 sequences, and 2 are given"):
        model(ids(2, 5), past_key_values=cache)


def test_two_threads_compute_what_one_does(network: Path) -> None:
    model = load(network)
    given = [ids(2, 40), ids(1, 70)]
    alone = [model(one).logits for one in given]

    def again(index: int) -> list[bool]:
        same = (model(given[index]).logits for _ in range(40))
        return [torch.equal(logits, alone[index]) for logits in same]

    with ThreadPoolExecutor(2) as pool:
        for right in pool.map(again, (0, 1)):
            assert all(right)


def test_a_copied_weight_outlives_the_first() -> None:
    layer = PlainLinear(torch.randn(96, 64).bfloat16(), None)
    x = torch.randn(3, 64).bfloat16()
    wanted = layer(x)
    other = copy.deepcopy(layer)
    del layer
    gc.collect()
    assert torch.equal(other(x), wanted)
    with pytest.raises(TypeError, match="of one process"):
        pickle.dumps(other)
