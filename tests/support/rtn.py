"""Checkpoints for tests in a second: real weights through the streaming writer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantkit.backends.streaming.job import Layout, StreamOptions
from quantkit.backends.streaming.run import clear_state, stream_quantize
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.network.modules import classify, linear_modules
from quantkit.checkpoint.schemes import Scheme
from quantkit.engines.aliases import expanded
from quantkit.formats import awq, compressed_tensors_config, gptq
from quantkit.formats.base import LayerSpec
from tests.support.helpers import edit_json, edit_tensors

PACKINGS = {"gptq": "gptq", "awq": awq.PACKING}


def rtn(
    source: Path,
    out: Path,
    scheme: Scheme,
    *,
    layout: Layout = "compressed-tensors",
    keep: Collection[str] = (),
) -> Path:
    """Quantize every linear layer and expert of `source` but those in `keep`, with sidecars."""
    checkpoint = open_checkpoint(source)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    modules = linear_modules(classify(shapes, checkpoint.config))
    layers = {
        m.name: scheme for m in modules if m.kind in ("linear", "experts") and m.name not in keep
    }
    out.mkdir(parents=True)
    stream_quantize(
        checkpoint, layers, out, options=StreamOptions(layout=layout), shard_size=10**9
    )  # fmt: skip
    clear_state(out)
    packing = PACKINGS.get(layout) or compressed_tensors_config.packing_of(scheme)
    spec = LayerSpec(scheme, packing, (0, 0))
    ignore = [m.name for m in modules if m.name not in layers and m.kind != "embedding"]
    ignore = expanded(ignore, checkpoint.config)
    writer = {"gptq": gptq, "awq": awq}.get(layout, compressed_tensors_config)
    config = {
        **checkpoint.config,
        "quantization_config": writer.quantization_config(dict.fromkeys(layers, spec), ignore),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for path in checkpoint.sidecars():
        shutil.copy(path, out / path.name)
    return out


def tiny_moe(out: Path, *, extra_layer: bool = False) -> Path:
    """A random Qwen3-MoE of 2 layers and 4 experts; `extra_layer` adds an MTP layer's tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    if extra_layer:
        file = out / "model.safetensors"
        tensors = load_file(file)
        tensors |= {
            name.replace("layers.1.", "layers.2."): tensor.clone()
            for name, tensor in tensors.items()
            if "layers.1.self_attn" in name
        }
        save_file(tensors, file, metadata={"format": "pt"})
        config_file = out / "config.json"
        value = json.loads(config_file.read_text()) | {"num_nextn_predict_layers": 1}
        config_file.write_text(json.dumps(value))
    return out


def fuse_experts(source: Path, out: Path) -> Path:
    """The same model with each layer's experts in two 3-D tensors, as Transformers 5 holds them."""
    shutil.copytree(source, out)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in sorted({n.split(".experts.")[0] for n in tensors if ".experts." in n}):
            stacks = {
                leaf: torch.stack(
                    [tensors.pop(f"{layer}.experts.{e}.{leaf}.weight") for e in range(4)]
                )
                for leaf in ("gate_proj", "up_proj", "down_proj")
            }
            both = torch.cat((stacks["gate_proj"], stacks["up_proj"]), 1)
            tensors[f"{layer}.experts.gate_up_proj"] = both
            tensors[f"{layer}.experts.down_proj"] = stacks["down_proj"]

    edit_tensors(out, change)
    return out


def fp8_blocks(source: Path, out: Path, side: int = 64) -> Path:
    """The model stored as DeepSeek stores its own: FP8 codes and `weight_scale_inv` a block."""
    shutil.copytree(source, out)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            weight = tensors[name].float()
            rows, columns = weight.shape
            blocks = weight.view(rows // side, side, columns // side, side)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            codes = (blocks / scale).to(torch.float8_e4m3fn)
            tensors[name] = codes.view(rows, columns)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0]

    edit_tensors(out, change)
    stated = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [side, side]}
    edit_json(out / "config.json", lambda config: config.update(quantization_config=stated))
    return out


def ascend_w4a8(source: Path, out: Path) -> Path:
    """A dense model as msModelSlim 26.1 writes W4A8_DYNAMIC: offsets and `scale_bias` are zero."""
    shutil.copytree(source, out)
    types: dict[str, str] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            module, kind = name.removesuffix(".weight"), "FLOAT"
            if name.endswith("_proj.weight"):
                kind, weight = "W4A8_DYNAMIC", tensors[name].float()
                scale = weight.abs().amax(1, keepdim=True) / 7
                codes = (weight / scale).round().to(torch.int8)
                tensors[name] = (codes[0::2] & 15) | (codes[1::2] << 4)
                tensors[f"{module}.weight_scale"] = scale
                tensors[f"{module}.weight_offset"] = torch.zeros_like(scale)
                tensors[f"{module}.scale_bias"] = torch.zeros_like(scale)
            parts = ("weight", "weight_scale", "weight_offset", "scale_bias")
            types.update(
                {f"{module}.{part}": kind for part in parts if f"{module}.{part}" in tensors}
            )

    edit_tensors(out, change)
    types |= {"version": "1.0.0", "model_quant_type": "W4A8_DYNAMIC"}
    (out / "quant_model_description.json").write_text(json.dumps(types))
    return out


def folded(source: Path, out: Path) -> Path:
    """The same function of the same model, with scales folded as AWQ does it.

    Norms into the columns of what they feed, rows of v_proj into columns of o_proj (each value
    head serves three query heads), rows of up_proj into columns of down_proj.
    """
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(out / "model.safetensors")
    wide = {name: tensor.float() for name, tensor in tensors.items()}

    def factors(size: int) -> torch.Tensor:
        return torch.exp2(2 * torch.rand(size, generator=generator) - 1)

    for name in [n for n in tensors if n.endswith("input_layernorm.weight")]:
        layer = name.removesuffix("input_layernorm.weight")
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            scale = factors(wide[name].numel())
            wide[f"{layer}{norm}.weight"] /= scale
            for reader in readers:
                wide[f"{layer}{reader}.weight"] *= scale
        up = factors(wide[f"{layer}mlp.up_proj.weight"].shape[0])
        wide[f"{layer}mlp.up_proj.weight"] /= up[:, None]
        wide[f"{layer}mlp.down_proj.weight"] *= up
        value = factors(wide[f"{layer}self_attn.v_proj.weight"].shape[0])
        heads = value.view(-1, 1, 64).expand(-1, 3, 64).reshape(-1)
        wide[f"{layer}self_attn.v_proj.weight"] /= value[:, None]
        wide[f"{layer}self_attn.o_proj.weight"] *= heads
    save_file(
        {name: tensor.to(tensors[name].dtype) for name, tensor in wide.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return out


def untied(source: Path, out: Path) -> Path:
    """The same model with its output head written out and `tie_word_embeddings` off."""
    shutil.copytree(source, out)
    edit_json(out / "config.json", lambda config: config.update(tie_word_embeddings=False))
    edit_tensors(
        out, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )  # fmt: skip
    return out


def rotated(source: Path, out: Path) -> Path:
    """The same function of an untied model, its hidden state and value heads turned (QuaRot)."""
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(1)

    def orthogonal(size: int) -> torch.Tensor:
        turn: torch.Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        return turn

    def change(tensors: dict[str, torch.Tensor]) -> None:
        wide = {name: tensor.float() for name, tensor in tensors.items()}
        turn, head = orthogonal(576), orthogonal(64)
        for name, tensor in wide.items():
            layer = name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0]
            if name.endswith("embed_tokens.weight"):
                wide[name] = tensor @ turn
            elif name == "lm_head.weight":
                wide[name] = tensor * wide["model.norm.weight"] @ turn
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                turned = tensor * wide[f"{layer}.input_layernorm.weight"] @ turn
                by_head = head.T @ turned.view(-1, 64, 576)
                wide[name] = by_head.reshape(-1, 576) if "v_proj" in name else turned
            elif name.endswith(("gate_proj.weight", "up_proj.weight")):
                wide[name] = tensor * wide[f"{layer}.post_attention_layernorm.weight"] @ turn
            elif name.endswith("o_proj.weight"):
                wide[name] = turn.T @ (tensor.view(576, -1, 64) @ head).reshape(576, -1)
            elif name.endswith("down_proj.weight"):
                wide[name] = turn.T @ tensor
        for name, tensor in wide.items():
            tensors[name] = (torch.ones_like(tensor) if "norm" in name else tensor).bfloat16()

    edit_tensors(out, change)
    return out
