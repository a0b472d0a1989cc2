"""How to damage a real checkpoint: each function changes one thing in a directory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.directory import read_header
from quantkit.checkpoint.tensors import read_tensor
from tests.support.helpers import edit_json, edit_tensors

Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]
L0, L1 = "model.layers.0.", "model.layers.1."
DOWN, GATE, UP = f"{L1}mlp.down_proj", f"{L1}mlp.gate_proj", f"{L1}mlp.up_proj"
Q, K, V = (f"{L1}self_attn.{leaf}_proj" for leaf in "qkv")


def patch(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrite one tensor's bytes where they are; dtype and shape stay."""
    info = read_header(directory / "model.safetensors")[name]
    old = read_tensor(info)
    new = change(old.clone()).to(old.dtype).contiguous()
    assert new.shape == old.shape
    with info.file.open("r+b") as handle:
        handle.seek(info.start)
        handle.write(new.reshape(-1).view(torch.uint8).numpy().tobytes())


def patching(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda directory: patch(directory, name, change)


def dropping(*names: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(names)]:
            del tensors[name]

    return lambda directory: edit_tensors(directory, change)


def replacing(name: str, make: Callable[[Tensors], torch.Tensor]) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda t: t.update({name: make(t)}))


def swapping(one: str, other: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{one}.")]:
            twin = other + name[len(one) :]
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return lambda directory: edit_tensors(directory, change)


def configuring(
    change: Callable[[Json], object], name: str = "config.json"
) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / name, change)


def both_quant_files(change: Callable[[list[str]], object]) -> Callable[[Path], None]:
    """Change the ignore list where ModelOpt writes it: in both files alike."""

    def apply(directory: Path) -> None:
        edit_json(directory / "config.json", lambda c: change(c["quantization_config"]["ignore"]))
        edit_json(
            directory / "hf_quant_config.json",
            lambda c: change(c["quantization"]["exclude_modules"]),
        )

    return apply


def together(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for change in changes:
            change(directory)

    return apply


def one_higher(tensor: torch.Tensor) -> torch.Tensor:
    """Every packed 4-bit zero point plus one."""
    return tensor + 0x11111111


def exchanged(tensor: torch.Tensor) -> torch.Tensor:
    """Two rows in each other's place."""
    tensor[[3, 9]] = tensor[[9, 3]].clone()
    return tensor


def page_lost(tensor: torch.Tensor) -> torch.Tensor:
    """4 KiB that never reached the disk."""
    tensor.view(-1)[2048:3072] = 0
    return tensor


def removing(*names: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return apply


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 4096)


def index_outside(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "../model.safetensors"}})
    )


def index_absent_shard(directory: Path) -> None:
    names = read_header(directory / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"a.weight": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def bad_header(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as handle:
        handle.write(struct.pack("<Q", 1 << 40))


def flip_last_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int16)[7] ^= 1
    return tensor


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Codes of one row replaced by other codes: a page that never reached the disk."""
    raw = tensor.view(torch.uint8)
    raw[5] = 0
    return tensor


def scrambled(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.view(torch.uint8).flatten()
    part = raw[: raw.numel() // 8]
    part.copy_(part.roll(1))
    return raw.view(tensor.dtype).view(tensor.shape)


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.float()
        wide.view(-1)[0] = value
        return wide.to(tensor.dtype)

    return change


def sixteen_bit(name: str) -> Callable[[Path], None]:
    """A declared layer left in 16 bit, its parameters gone."""

    def change(tensors: Tensors) -> None:
        shape = tensors[f"{name}.weight"].shape
        for extra in [n for n in tensors if n.startswith(f"{name}.")]:
            del tensors[extra]
        tensors[f"{name}.weight"] = torch.full(shape, 0.01, dtype=torch.bfloat16)

    return lambda directory: edit_tensors(directory, change)


def quantize_kept(module: str) -> Callable[[Path], None]:
    """FP8 codes and a scale for a module that the config keeps in 16 bit."""

    def change(tensors: Tensors) -> None:
        weight = tensors[f"{module}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors[f"{module}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = scale.to(torch.bfloat16)

    return lambda directory: edit_tensors(directory, change)


def quantize_router(directory: Path) -> None:
    quantize_kept(f"{L0}mlp.gate")(directory)

    def declare(config: Json) -> None:
        ignore = config["quantization_config"]["ignore"]
        config["quantization_config"]["ignore"] = [e for e in ignore if e != f"{L0}mlp.gate"]

    edit_json(directory / "config.json", declare)


def expert_in_16_bit(directory: Path) -> None:
    expert = f"{L0}mlp.experts.1.down_proj"
    sixteen_bit(expert)(directory)
    edit_json(
        directory / "config.json", lambda c: c["quantization_config"]["ignore"].append(expert)
    )


def all_ones(suffixes: tuple[str, ...]) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(suffixes):
                tensors[name] = torch.ones_like(tensors[name])

    return lambda directory: edit_tensors(directory, change)


def unlike_global_scale(directory: Path) -> None:
    """k_proj alone gets another global scale, its block scales corrected: the weights are right."""

    def change(tensors: Tensors) -> None:
        tensors[f"{K}.weight_scale_2"] *= 2
        halved = tensors[f"{K}.weight_scale"].float() / 2
        tensors[f"{K}.weight_scale"] = halved.to(torch.float8_e4m3fn)

    edit_tensors(directory, change)


def other_scheme_in_group(directory: Path) -> None:
    """k_proj in 16 bit, properly declared: engines cannot merge it with q_proj and v_proj."""
    sixteen_bit(K)(directory)
    both_quant_files(lambda entries: entries.append(K))(directory)


def double_column(tensor: torch.Tensor) -> torch.Tensor:
    tensor[40] *= 2
    return tensor


def zero_column(tensor: torch.Tensor) -> torch.Tensor:
    tensor[40] = 0
    return tensor


def quant_algo(name: str) -> Callable[[Json], object]:
    return lambda config: config["quantization_config"].update(quant_algo=name)


def prefix_entries(entries: list[str]) -> None:
    entries[:] = [entry.replace("model.layers", "language_model.layers") for entry in entries]


def without(entry: str) -> Callable[[list[str]], object]:
    return lambda entries: entries.remove(entry)
