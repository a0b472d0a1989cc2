"""Open a model for planning: headers where they are, rules where they are not."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from quantkit.checkpoint.directory import (
    DTYPE_BITS,
    Checkpoint,
    TensorInfo,
    index_of,
    open_checkpoint,
    read_header,
    read_model_config,
    read_weight_map,
    with_inverse_scales,
)
from quantkit.checkpoint.gguf_source import (
    bf16_bytes,
    config_of,
    planning_note,
    read_source,
)
from quantkit.checkpoint.network.fp8_blocks import INVERSE_SCALE, weight_block
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.sizes import sizes
from quantkit.checkpoint.network.tensor_names import derived_names, is_known
from quantkit.checkpoint.network.tensor_shapes import derived_shape
from quantkit.checkpoint.weight_files import missing_shard, refuse_adapter, strangers
from quantkit.errors import InputError

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def open_headers(path: Path) -> Checkpoint:
    """The checkpoint in a directory, of which all or some shards may be absent.

    The tensors of absent shards get the shapes that the family's rules give them, and
    `Checkpoint.derived` says from what. Raises InputError as `open_checkpoint` for anything else
    that is wrong, and (`plan.underivable`) where the config lacks the sizes or names no known
    family.
    """
    index = index_of(path) if path.is_dir() else None
    if index is not None:
        weight_map = read_weight_map(path, index)
        absent = {file for file in weight_map.values() if not os.path.lexists(path / file)}
        if absent and strangers(path, weight_map):
            raise missing_shard(path, index, weight_map)
        return _with_absent(path, weight_map, absent) if absent else open_checkpoint(path)
    if path.is_dir():
        refuse_adapter(path)
    config_only = path.is_dir() and (path / "config.json").is_file()
    if config_only and not any(path.glob("*.safetensors")) and not _other_weights(path):
        return from_config(path, read_model_config(path / "config.json"))
    return open_checkpoint(path)


def from_config(path: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint that the family's rules derive from a config.json."""
    if not is_known(config):
        raise InputError(
            f"{path} has no weights and no index, and the tensor names of the family "
            f"{config.get('model_type', 'unknown')!r} cannot be derived from its config.",
            hint="add model.safetensors.index.json; it is enough for a plan",
            code="plan.underivable",
        )
    names = derived_names(config, sizes(config))
    tensors = _derived(path / "model.safetensors", names, config, set(names))
    return Checkpoint(path, config, tensors, derived="config.json")


def from_gguf(file: Path) -> Checkpoint:
    """What a GGUF file will be once dequantized, by its header and the family's rules.

    Raises InputError: `gguf.unreadable`, `gguf.architecture` (Transformers cannot read it) and
    `plan.underivable` (no rules for the family: the plan needs the conversion).
    """
    held = read_source(file)
    config = config_of(held)
    if not is_known(config):
        there = file.with_name(f"{file.stem}-bf16")
        convert = [sys.executable, "-m", "quantkit.checkpoint.gguf_source", str(file.parent)]
        raise InputError(
            f"The names of the tensors of {file} cannot be derived for the family "
            f"{config.get('model_type', 'unknown')!r}: a plan needs it dequantized "
            f"({bf16_bytes(held) / 1e9:.2f} GB in BF16).",
            hint=f"{shlex.join([*convert, file.name, str(there)])}  # then give {there} as MODEL",
            code="plan.underivable",
        )
    derived = from_config(file, config)
    return replace(derived, derived="the GGUF header", notes=(planning_note(held),))


def _with_absent(path: Path, weight_map: Mapping[str, str], absent: set[str]) -> Checkpoint:
    config = read_model_config(path / "config.json")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values()) - absent):
        tensors |= read_header(path / file)
    for file in sorted(absent):
        names = [name for name, place in weight_map.items() if place == file]
        tensors |= _derived(path / file, names, config, weight_map)
    ordered = {name: tensors[name] for name in weight_map if name in tensors}
    present = len(absent) < len(set(weight_map.values()))
    rest = "present shards" if present else "config.json"
    return Checkpoint(path, config, ordered, derived=f"the index and {rest}")


def _derived(
    file: Path, names: Sequence[str], config: Mapping[str, Any], every: Collection[str]
) -> dict[str, TensorInfo]:
    """`names` in a file; `every` is all names of the model, whose scales may be in another."""
    size = sizes(config)
    if not (size.hidden and size.heads and size.vocabulary):
        raise InputError(
            f"{file.parent}/config.json does not state hidden_size, num_attention_heads and "
            "vocab_size, from which shapes are derived.",
            hint="give a directory with its weights, or with the model's own config.json",
            code="plan.underivable",
        )
    text = text_config(config)
    stated = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "")
    dtype = _DTYPES.get(stated.removeprefix("torch."), "BF16")
    found, start = {}, 8
    for name in names:
        weight = name.removesuffix(INVERSE_SCALE)
        shape, kind = derived_shape(weight, config, size), dtype
        if weight != name:
            shape, kind = _grid(shape, config), "F32"
        elif f"{name}{INVERSE_SCALE}" in every:
            kind = "F8_E4M3"
        end = start + prod(shape) * DTYPE_BITS[kind] // 8
        found[name] = TensorInfo(name, kind, shape, file, start, end)
        start = end
    return found


def _grid(shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a weight's inverse scales: one a block of `weight_block_size`."""
    return tuple(-(-n // step) for n, step in zip(shape, weight_block(config), strict=False))


def _other_weights(path: Path) -> bool:
    suffixes = ("bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf")
    return any(any(path.glob(f"*.{suffix}")) for suffix in suffixes)


def remote_checkpoint(path: Path, headers: Mapping[str, TensorInfo]) -> Checkpoint:
    """A snapshot without weights, with the headers that the hub was asked for."""
    refuse_adapter(path)
    config = read_model_config(path / "config.json")
    return Checkpoint(
        path, config, with_inverse_scales(dict(headers), config), derived="the hub's headers"
    )
