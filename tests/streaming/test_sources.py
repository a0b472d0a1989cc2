"""Sources of other shapes than a dense 16-bit model: experts, fused experts, FP8 blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.backends.streaming.job import StreamOptions
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from tests.support.mixtures import mixture
from tests.support.rtn import tiny_moe
from tests.support.streaming import plain_layers, scheme_named, stream, tensors_of, write_model


def test_experts_of_a_mixture(tmp_path: Path) -> None:
    """Routed experts are quantized each, gate and up share a global scale, the router is kept."""
    model = tiny_moe(tmp_path / "moe", extra_layer=True)
    result = stream(model, tmp_path / "out", "nvfp4a16")
    tensors = tensors_of(tmp_path / "out")
    expert = "model.layers.0.mlp.experts.3"
    gate, up = (
        tensors[f"{expert}.{leaf}.weight_global_scale"] for leaf in ("gate_proj", "up_proj")
    )
    assert torch.equal(gate, up)
    router = "model.layers.0.mlp.gate.weight"
    assert result.digests[router] == result.source_digests[router]
    mtp = "model.layers.2.self_attn.q_proj.weight"
    assert result.digests[mtp] == result.source_digests[mtp]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("scheme", "inner"), [("fp8_dynamic", 96), ("nvfp4a16", 96), ("w4a16:32", 96), ("mxfp8", 32)]
)
def test_fused_experts_become_one_layer_each(
    scheme: str, inner: int, transposed: bool, tmp_path: Path
) -> None:
    """The same bytes as the same experts stored one by one, also where gate and up are square."""
    generator = torch.Generator().manual_seed(0)
    experts, hidden = 4, 64
    gate, up, down = (
        torch.randn(experts, *shape, generator=generator).bfloat16()
        for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    pair = torch.cat((gate, up), 1)
    if transposed:
        pair, down_stored = pair.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    else:
        down_stored = down
    parent = "model.layers.0.mlp.experts"
    config = {"hidden_size": hidden, "num_hidden_layers": 1, "num_experts": experts}
    fused = {f"{parent}.gate_up_proj": pair, f"{parent}.down_proj": down_stored}
    single = {
        f"{parent}.{e}.{leaf}_proj.weight": weight[e].contiguous()
        for e in range(experts)
        for leaf, weight in (("gate", gate), ("up", up), ("down", down))
    }
    write_model(tmp_path / "fused", [fused], config)
    write_model(tmp_path / "single", [single], config)
    ours = stream(tmp_path / "fused", tmp_path / "a", scheme)
    theirs = stream(tmp_path / "single", tmp_path / "b", scheme)
    assert ours.digests == theirs.digests
    assert ours.source_digests == open_checkpoint(tmp_path / "fused").digests()


@pytest.mark.parametrize(
    ("shape", "extra", "told"),
    [((4, 64, 64), {}, "which dimension is the input"), ((4, 64, 32), {"_bias": (4, 32)}, "bias")],
)
def test_fused_experts_of_unknown_layout_are_refused(
    shape: tuple[int, ...], extra: dict[str, tuple[int, ...]], told: str, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: torch.ones(shape), **{name + k: torch.ones(v) for k, v in extra.items()}}
    model = write_model(tmp_path / "m", [tensors], {"hidden_size": 64, "num_hidden_layers": 1})
    with pytest.raises(InputError, match=told) as caught:
        stream(model, tmp_path / "out", "fp8_dynamic")
    assert name in caught.value.message


def test_alternating_rows_and_biases_are_dealt_out(tmp_path: Path) -> None:
    """GPT-OSS: the same bytes as the same experts stored one by one, each with its bias."""
    model = mixture("gpt_oss", tmp_path / "fused")
    fused = tensors_of(model)
    single = {}
    for name, tensor in fused.items():
        parent, _, leaf = name.rpartition(".")
        if ".experts." not in name:
            single[name] = tensor
            continue
        stem, bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
        for number, one in enumerate(tensor if bias else tensor.mT):
            both = [one[0::2], one[1::2]] if stem == "gate_up_proj" else [one]
            names = ("gate_proj", "up_proj") if len(both) == 2 else (stem,)
            for part, rows in zip(names, both, strict=True):
                kind = "bias" if bias else "weight"
                single[f"{parent}.{number}.{part}.{kind}"] = rows.contiguous()
    apart = write_model(tmp_path / "single", [single], {"hidden_size": 128, "num_hidden_layers": 2})
    ours, theirs = (stream(source, tmp_path / f"{source.name}-out", "w4a16:32")
                    for source in (model, apart))  # fmt: skip
    assert ours.digests == theirs.digests
    assert ours.source_digests == open_checkpoint(model).digests()


def fp8_block_copy(source: Path, out: Path) -> tuple[Path, Path]:
    """The model in DeepSeek's FP8 blocks (real codes and scales), and what that means in BF16."""
    tensors = load_file(source / "model.safetensors")
    stored, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            scale = torch.zeros(-(-rows // 128), -(-columns // 128))
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    block = weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
                    scale[i, j] = block.abs().max() / 448
            wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            stored[name] = (weight / wide).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = (stored[name].float() * wide).bfloat16()
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    half = len(stored) // 2
    items = sorted(stored.items(), key=lambda item: item[0][::-1])
    shards = [dict(items[:half]), dict(items[half:])]
    return (
        write_model(out / "fp8", shards, {**config, "quantization_config": quantization}),
        write_model(out / "bf16", [meant], config),
    )


@pytest.mark.parametrize("scheme", ["w4a16:64", "nvfp4a16"])
def test_a_source_in_fp8_blocks(scheme: str, small_model: Path, tmp_path: Path) -> None:
    fp8, bf16 = fp8_block_copy(small_model, tmp_path)
    ours = stream(fp8, tmp_path / "a", scheme)
    theirs = stream(bf16, tmp_path / "b", scheme)
    assert ours.digests == theirs.digests
    assert ours.source_digests == open_checkpoint(fp8).digests()


def test_a_kept_layer_of_an_fp8_source_comes_out_in_16_bit(
    small_model: Path, tmp_path: Path
) -> None:
    fp8, bf16 = fp8_block_copy(small_model, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    edit = load_file(bf16 / "model-00001-of-00001.safetensors")[name]
    checkpoint = open_checkpoint(fp8)
    from quantkit.backends.streaming.run import stream_quantize

    out = tmp_path / "out"
    out.mkdir()
    layers = plain_layers(checkpoint, scheme_named("fp8_dynamic"))
    layers = {n: s for n, s in layers.items() if ".mlp." not in n}
    stream_quantize(checkpoint, layers, out, options=StreamOptions(), shard_size=10**9)
    written = tensors_of(out)
    assert torch.equal(written[name], edit)
    assert f"{name}_scale_inv" not in written


@pytest.mark.parametrize("wrong", ["shape", "dtype", "experts"])
def test_block_scales_that_do_not_fit_are_refused(wrong: str, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    shape, grid = (256, 192), (2, 2)
    scale = torch.ones(grid[::-1] if wrong == "experts" else grid)
    if wrong == "shape":
        scale = torch.ones(2, 1)
    elif wrong == "dtype":
        scale = scale.to(torch.int32)
    codes = torch.ones(*((3, *shape) if wrong == "experts" else shape)).to(torch.float8_e4m3fn)
    model = write_model(
        tmp_path / "model", [{name: codes, f"{name}_scale_inv": scale}], {"hidden_size": 192}
    )
    with pytest.raises(InputError, match="_scale_inv") as caught:
        stream(model, tmp_path / "out", "fp8_dynamic")
    assert caught.value.code == "stream.block_scales"
