"""A quantized checkpoint as a source: dequantized layer by layer to a BF16 directory in the cache.

For models that are published in no other form: FP8 in blocks (DeepSeek), packed integers of
compressed-tensors (Kimi), MXFP4 experts (GPT-OSS). What quantkit made itself has a 16-bit original,
and is refused as a source.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.directory import Checkpoint, TensorInfo, open_checkpoint
from quantkit.checkpoint.headers import DTYPE_BITS, header_bytes
from quantkit.checkpoint.hub import resolve_model
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.fp8_blocks import BLOCK_SIZE
from quantkit.checkpoint.paths import cache_dir, keep_first
from quantkit.checkpoint.provenance import PROVENANCE
from quantkit.checkpoint.tensors import pieces, read_tensor
from quantkit.checkpoint.weight_files import DEQUANTIZED
from quantkit.formats import compressed_tensors, fp8, mxfp4
from quantkit.formats.base import LayerSpec, is_kv_cache_tensor
from quantkit.formats.inventory import expert
from quantkit.formats.quantized import QuantizedCheckpoint, examine
from quantkit.formats.registry import detect, is_quantized
from quantkit.pipeline.publish import check_space

if TYPE_CHECKING:
    import torch

_SETTINGS = ("quantization_config", "compression_config")


def as_subject(source: Checkpoint) -> QuantizedCheckpoint | None:
    """A source in one of the layouts that are read, by module; None for any other checkpoint.

    Raises InputError (`format.*`) for a configuration that contradicts itself.
    """
    settings = source.quantization_config
    if not settings or (source.path / PROVENANCE).is_file() or is_quantized(source) is None:
        return None
    readable = (
        (mxfp4.recognises(source))
        or (fp8.recognises(source) and bool(settings.get(BLOCK_SIZE)))
        or (compressed_tensors.recognises(source) and settings.get("format") == "pack-quantized")
    )
    return examine(source, detect(source)) if readable else None


def comparable(name: str) -> Path:
    """The directory of a model that `verify` compares with: as it is in 16 bit or in FP8 blocks, of
    another quantized source its dequantized copy. Raises as `resolve_model` and `dequantized`."""
    path = resolve_model(name)
    source = open_checkpoint(path)
    subject = None if fp8.recognises(source) else as_subject(source)
    return dequantized(subject) if subject else path


def planned(subject: QuantizedCheckpoint) -> Checkpoint:
    """The BF16 checkpoint that `dequantized` will write, by headers alone."""
    source = subject.checkpoint
    tensors, at = {}, 0
    for name, (_, dtype, shape) in _entries(subject).items():
        size = _bytes(dtype, shape)
        tensors[name] = TensorInfo(name, dtype, shape, source.path, at, at + size)
        at += size
    note = (
        f"the source is quantized itself ({is_quantized(source)}): quantize dequantizes it to BF16 "
        f"first, {at / 1e9:.2f} GB in {cache_dir()}; its rounding stays in it"
    )
    return Checkpoint(
        source.path, _config(source), tensors,
        derived="its quantized layers", notes=(*source.notes, note),
    )  # fmt: skip


def dequantized(subject: QuantizedCheckpoint) -> Path:
    """The BF16 directory of a quantized checkpoint; made first when it is not cached.

    A layer is in memory at a time. Raises InputError (`output.no_space`).
    """
    source = subject.checkpoint
    key = source.fingerprint()
    target = cache_dir() / "dequantized" / key[:16] / source.path.resolve().name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    entries = _entries(subject)
    size = sum(_bytes(dtype, shape) for _, dtype, shape in entries.values())
    check_space(target, round(size * 1.02), f"{source.path.name} dequantized to BF16")
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        staged = Path(work) / target.name
        staged.mkdir()
        weight_map: dict[str, str] = {}
        for file in source.files:
            own = {name: entry for name, entry in entries.items() if entry[0].file == file}
            if own:
                _write(subject, staged / file.name, own)
            weight_map |= dict.fromkeys(own, file.name)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(staged / "model.safetensors.index.json", index)
        _write_json(staged / "config.json", _config(source))
        _write_json(staged / DEQUANTIZED, {"layout": is_quantized(source), "fingerprint": key})
        for path in (*source.sidecars(), *source.path.glob("*.py")):
            shutil.copyfile(path, staged / path.name)
        keep_first(staged, target)
    return target


_Entry = tuple[TensorInfo, str, tuple[int, ...]]
"""What a tensor of the copy is made from (of a layer its codes), its dtype and its shape."""


def _entries(subject: QuantizedCheckpoint) -> dict[str, _Entry]:
    """Name → what the copy holds, in the order of the source."""
    found: dict[str, _Entry] = {}
    for name, info in subject.checkpoint.tensors.items():
        module = subject.owned.get(name)
        if module is not None:
            if info == subject.part(module, "weight"):
                found[_weight_name(subject, module)] = (info, "BF16", _shape(subject, module))
        elif not is_kv_cache_tensor(name):
            found[name] = (info, info.dtype, info.shape)
    return found


def _weight_name(subject: QuantizedCheckpoint, module: str) -> str:
    return module if subject.declaration.layers[module].experts else f"{module}.weight"


def _shape(subject: QuantizedCheckpoint, module: str) -> tuple[int, ...]:
    spec = subject.declaration.layers[module]
    if not spec.experts:
        return spec.shape
    rows, columns = spec.shape
    return (spec.experts, *((columns, rows) if _input_first(subject, spec) else (rows, columns)))


def _input_first(subject: QuantizedCheckpoint, spec: LayerSpec) -> bool:
    """Whether the 16-bit form of the family holds each fused expert as [in, out]."""
    return spec.transposed or bool(family(subject.checkpoint.config).experts.input_first)


def _write(subject: QuantizedCheckpoint, file: Path, entries: dict[str, _Entry]) -> None:
    """One shard: the header, then each tensor at its place."""
    import torch

    head, places = header_bytes({name: entry[1:] for name, entry in entries.items()})
    with file.open("wb") as handle:
        handle.write(head)
        for name, (info, _, _) in entries.items():
            handle.seek(places[name])
            module = subject.owned.get(info.name)
            if module is None:
                for piece in pieces(info):
                    handle.write(piece.data)
                continue
            for matrix in _matrices(subject, module):
                handle.write(matrix.contiguous().view(torch.uint8).numpy().data)
        handle.flush()
        os.fsync(handle.fileno())


def _matrices(subject: QuantizedCheckpoint, module: str) -> Iterator[torch.Tensor]:
    """The layer's weight in BF16, of fused experts one after the other."""
    import torch

    from quantkit.formats.dequantize import dequantize

    spec, parts = subject.declaration.layers[module], subject.parts[module]
    held = {name: read_tensor(parts[name]) for name in subject.expected[module] if name in parts}
    for number in range(max(spec.experts, 1)):
        tensors = expert(held, spec, number) if spec.experts else held
        weight = dequantize(replace(subject.layout.read(tensors, spec), bias=None))
        matrix = weight.to(torch.bfloat16)
        yield matrix.T if spec.experts and _input_first(subject, spec) else matrix


def _config(source: Checkpoint) -> dict[str, Any]:
    """config.json without what says that the weights are quantized."""

    def plain(level: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in level.items() if key not in _SETTINGS}

    config = plain(source.config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = plain(config["text_config"])
    return config


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = DTYPE_BITS[dtype]
    for side in shape:
        size *= side
    return size // 8


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
