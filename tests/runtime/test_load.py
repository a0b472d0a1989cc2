"""Loading: every layout close to Transformers on the library's own weights, bad input refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.calibration.heldout import held_out_texts
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.load import load
from quantkit.runtime.loading.fuse import harmonize, join
from tests.formats.test_artifacts import CASES, opened, read_layer
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors
from tests.support.kernels import random_weight
from tests.support.streaming import tensors_of

Artifact = Callable[[str], Path]

IDS = torch.randint(3, 4096, (2, 40), generator=torch.Generator().manual_seed(0))


def transformers_model(path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence of next-token distributions, nats."""
    one, other = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def plain(artifact: Artifact) -> Any:
    """The 16-bit model that the artifacts are made from, in Transformers, float32."""
    return transformers_model(artifact("llmcompressor/source"), torch.float32)


@torch.inference_mode()
def library_logits(plain: Any, path: Path) -> torch.Tensor:
    """Transformers' logits with the weights that the library dequantizes to."""
    checkpoint, layout, declaration = opened(path)
    names = [name for name, info in checkpoint.tensors.items() if info.dtype == "BF16"]
    state = {name: checkpoint.tensor(name).float() for name in names}
    for name in declaration.layers:
        state[f"{name}.weight"] = dequantize(read_layer(checkpoint, layout, declaration, name))
    plain.load_state_dict(state, strict=False)
    logits: torch.Tensor = plain(IDS).logits
    return logits


@pytest.mark.parametrize("name", CASES)
def test_every_layout_computes_what_its_library_dequantizes_to(
    artifact: Artifact, plain: Any, name: str
) -> None:
    path = artifact(name)
    wanted = library_logits(plain, path)
    exact = load(path, kernel="dequantized", dtype="float32", fuse="none")
    assert exact.layout == CASES[name][0]
    found = exact(IDS).logits
    if CASES[name][2] == "none":
        assert torch.allclose(found, wanted, atol=2e-3, rtol=1e-3)
    else:  # Transformers has no FP8 cache
        assert divergence(wanted, found) < 0.05

    served = load(path)
    assert {layer.module for layer in served.layers} == CASES[name][1]
    assert not served.weights_only
    quantizes = any(SCHEMES[scheme].input is not None for scheme in CASES[name][3])
    assert divergence(wanted, served(IDS).logits) < (0.6 if quantizes else 0.01)


def test_bf16_is_what_transformers_computes(small_model: Path) -> None:
    ids = torch.randint(3, 49000, (2, 100), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    theirs, ours = (
        transformers_model(small_model, torch.float32),
        load(small_model, dtype="float32"),
    )
    with torch.inference_mode():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)
        padded = theirs(ids, attention_mask=mask).logits[mask.bool()]
        assert torch.allclose(ours(ids, mask).logits[mask.bool()], padded, atol=1e-3)
        last = ours(ids, logits_to_keep=1).logits
        assert last.shape == (2, 1, ours.config.vocab_size)
        assert torch.allclose(last, ours(ids).logits[:, -1:], atol=1e-4)
    assert ours.layers == []
    assert ours.layout is None
    half = load(small_model)
    assert half.dtype == torch.bfloat16
    assert divergence(ours(ids).logits, half(ids).logits) < 2e-3


def perplexity(model: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        logits = model(ids).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return float(loss.exp())


def test_perplexity_of_the_demo_model_is_that_of_transformers(demo_model: Path) -> None:
    tokenizer = load_tokenizer(read_tokenizer_info(demo_model))
    ids = torch.tensor([tokenizer.encode(held_out_texts()[0], False)[:512]])
    theirs = perplexity(transformers_model(demo_model, torch.bfloat16), ids)
    ours = perplexity(load(demo_model), ids)
    assert 15 < ours < 40
    assert ours == pytest.approx(theirs, rel=0.005)


def scales_of_qkv(model: Any) -> list[float]:
    scales: list[float] = model.network.blocks[0].qkv.packed.weight.outer.tolist()
    return scales


def test_fused_groups_are_served_on_their_largest_scale(artifact: Artifact) -> None:
    path = artifact("modelopt/fp8_kv")
    stored = {
        name: tensor
        for name, tensor in tensors_of(path).items()
        if name.endswith("proj.weight_scale") and ".layers.0.self_attn." in name
    }
    largest = max(float(stored[name]) for name in stored if "o_proj" not in name)
    engine, raw = load(path), load(path, fuse="none")
    assert scales_of_qkv(engine) == [pytest.approx(largest)]
    assert len(set(scales_of_qkv(raw))) == 3
    assert not torch.equal(engine(IDS).logits, raw(IDS).logits)


def test_members_with_ranges_of_their_own_are_merged_as_vllm_does() -> None:
    scheme = SCHEMES["w8a8_asym"]
    members = [
        replace(
            random_weight(SCHEMES["w8a8"], (8, 32)),
            zero_point=None,
            input_scale=torch.tensor([scale]),
            input_zero_point=torch.tensor([zero]),
        )
        for scale, zero in ((0.02, -40.0), (0.05, 20.0), (0.02, -40.0))
    ]
    assert join(members) is None  # as the file has them: one cannot speak for another
    one, *others = harmonize(["q", "k", "v"], members, scheme)
    low, high = 0.05 * (-128 - 20), 0.05 * (127 - 20)
    assert high > 0.02 * (127 + 40)
    assert float(one.input_scale) == pytest.approx((high - low) / 255)  # type: ignore[arg-type]
    assert float(one.input_zero_point) == 20  # type: ignore[arg-type]
    assert all(other.input_zero_point == one.input_zero_point for other in others)
    assert join([one, *others]) is not None
    wide = [members[0], replace(members[1], input_zero_point=torch.tensor([100.0]))]
    merged = harmonize(["gate", "up"], wide, scheme)[0]
    low, high = 0.05 * (-128 - 100), 0.02 * (127 + 40)
    assert float(merged.input_scale) == pytest.approx((high - low) / 255)  # type: ignore[arg-type]
    zero = int(-128 - low / ((high - low) / 255))
    assert float(merged.input_zero_point) == zero  # type: ignore[arg-type]
    same = harmonize(["gate", "up"], [members[0], members[2]], scheme)
    assert float(same[0].input_zero_point) == -40  # type: ignore[arg-type]


def test_cache_scales_of_heads_are_refused_by_name(artifact: Artifact, tmp_path: Path) -> None:
    damaged = copy_checkpoint(artifact("modelopt/fp8_kv"), tmp_path / "damaged")
    names = [f"model.layers.{index}.self_attn.k_proj.k_scale" for index in range(3)]
    edit_tensors(damaged, lambda t: t.update({n: t[n].reshape(1).repeat(3) for n in names}))
    with pytest.raises(InputError, match="k_scale holds 3 scales") as caught:
        load(damaged)
    assert caught.value.code == "runtime.cache_scale"


def test_unequal_fp4_globals_are_refused_unless_asked_for(
    artifact: Artifact, tmp_path: Path
) -> None:
    damaged = copy_checkpoint(artifact("llmcompressor/nvfp4"), tmp_path / "damaged")
    name = "model.layers.1.self_attn.k_proj.weight_global_scale"
    edit_tensors(damaged, lambda t: t[name].mul_(0.5))
    with pytest.raises(InputError) as caught:
        load(damaged)
    assert caught.value.code == "runtime.global_scales_differ"
    assert "layers.1.self_attn" in caught.value.message
    load(damaged, fuse="none")


Damage = Callable[[Path], object]


def _config(**changes: Any) -> Damage:
    return lambda path: edit_json(path / "config.json", lambda c: c.update(changes))


def _quantization(**changes: Any) -> Damage:
    return lambda path: edit_json(
        path / "config.json", lambda c: c["quantization_config"].update(changes)
    )


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = new

    return lambda path: edit_tensors(path, edit)


DAMAGES: dict[str, tuple[str, Damage, str, str]] = {
    # what is wrong: (artifact, damage, code, named in the message)
    "unknown method": (
        "llmcompressor/w8a8", _quantization(quant_method="squeeze"), "format.unknown", "squeeze",
    ),
    "no declaration": (
        "llmcompressor/w8a8",
        lambda path: edit_json(path / "config.json", lambda c: c.pop("quantization_config")),
        "format.none", "quantization_config",
    ),
    "another algorithm": (
        "modelopt/fp8_pc_pt",
        lambda path: edit_json(
            path / "hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="NVFP4")
        ),
        "format.contradiction", "NVFP4",
    ),
    "missing scale": (
        "llmcompressor/w8a8",
        _tensor("model.layers.1.mlp.up_proj.weight_scale", lambda t: None),
        "declared.missing_tensor", "model.layers.1.mlp.up_proj",
    ),
    "wrong shape": (
        "llmcompressor/w4a16",
        _tensor("model.layers.0.mlp.up_proj.weight_packed", lambda t: t[:-1].contiguous()),
        "declared.wrong_shape", "model.layers.0.mlp.up_proj",
    ),
    "NaN scale": (
        "gptqmodel/w4",
        _tensor("model.layers.2.mlp.down_proj.scales", lambda t: t.index_fill(1, torch.tensor(3),
                                                                              torch.nan)),
        "scale.nonfinite", "model.layers.2.mlp.down_proj.scales",
    ),
    "NaN code": (
        "modelopt/fp8_pc_pt",
        _tensor("model.layers.0.self_attn.o_proj.weight",
                lambda t: t.view(torch.uint8).index_fill(0, torch.tensor(5), 127).view(t.dtype)),
        "codes.nonfinite", "model.layers.0.self_attn.o_proj.weight",
    ),
    "NaN norm": (
        "llmcompressor/w8a8", _tensor("model.norm.weight", lambda t: t * torch.nan),
        "tensor.nonfinite", "model.norm.weight",
    ),
    "no norm": (
        "llmcompressor/w8a8", _tensor("model.norm.weight", lambda t: None),
        "complete.no_final_norm", "final norm",
    ),
    "fewer layers": (
        "llmcompressor/w8a8", _config(num_hidden_layers=2), "runtime.unused_tensors",
        "model.layers.2.",
    ),
    "another width": (
        "llmcompressor/w8a8", _config(intermediate_size=1024), "runtime.wrong_shape", "1536",
    ),
    "unknown architecture": (
        "llmcompressor/w8a8", _config(model_type="llamma"), "runtime.architecture", "llamma",
    ),
    "an activation that is a number": (
        "llmcompressor/w8a8", _config(hidden_act=5), "runtime.architecture", "hidden_act",
    ),
    "an epsilon that is a word": (
        "llmcompressor/w8a8", _config(rms_norm_eps="x"), "runtime.architecture", "rms_norm_eps",
    ),
    "an end of text that is a word": (
        "llmcompressor/w8a8", _config(eos_token_id="2"), "runtime.architecture", "eos_token_id",
    ),
    "no heads": (
        "llmcompressor/w8a8", _config(num_attention_heads=0), "runtime.architecture", "",
    ),
    "unknown rotary frequencies": (
        "llmcompressor/w8a8",
        _config(rope_parameters={"rope_type": "novel", "rope_theta": 1e4}),
        "runtime.architecture", "novel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_inconsistent_is_refused_by_name(
    artifact: Artifact, tmp_path: Path, what: str
) -> None:
    name, damage, code, telling = DAMAGES[what]
    path = copy_checkpoint(artifact(name), tmp_path / "damaged")
    damage(path)
    with pytest.raises(InputError) as caught:
        load(path)
    assert caught.value.code == code, caught.value.message
    assert telling in caught.value.message
    assert caught.value.hint


def test_requests_that_cannot_be_met_are_refused(artifact: Artifact) -> None:
    path = artifact("llmcompressor/w8a8")
    for code, more in {
        "kernel.refused": {"kernel": "int4_cpu"},
        "kernel.unknown": {"kernel": "cutlas"},
        "runtime.device": {"device": "cuda:7"},
        "runtime.dtype": {"dtype": "float8"},
    }.items():
        with pytest.raises(InputError) as caught:
            load(path, **more)  # type: ignore[arg-type]
        assert caught.value.code == code


def test_a_run_without_quantized_activations_says_so(artifact: Artifact) -> None:
    model = load(artifact("llmcompressor/w8a8"), kernel="dequantized")
    assert model.weights_only
    assert model.kernels() == {"dequantized": len(CASES["llmcompressor/w8a8"][1])}


def test_another_gpus_engine_decides_which_activations_are_rounded(artifact: Artifact) -> None:
    path = artifact("llmcompressor/nvfp4")
    hopper = load(path, as_on="h100")
    assert hopper.schemes_with_16_bit_inputs == ["nvfp4"]
    assert not hopper.weights_only
    expanded = load(path, kernel="dequantized")
    assert divergence(expanded(IDS).logits, hopper(IDS).logits) < 0.01
    rounded = load(path, as_on="b200")
    assert rounded.schemes_with_16_bit_inputs == []
    assert torch.equal(rounded(IDS).logits, load(path)(IDS).logits)
    assert not torch.equal(rounded(IDS).logits, hopper(IDS).logits)
