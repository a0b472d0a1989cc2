"""What the streaming tests share: layers of a checkpoint, sharded copies, one streamed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantkit.backends.streaming.job import StreamOptions, StreamResult
from quantkit.backends.streaming.run import stream_quantize
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.network.modules import classify, linear_modules
from quantkit.checkpoint.schemes import SCHEMES, Scheme


def scheme_named(name: str) -> Scheme:
    """`w4a16:64`, `w4a16:64:asymmetric`: a named scheme, its group size, its symmetry."""
    name, size, symmetry = f"{name}::".split(":")[:3]
    scheme = SCHEMES[name]
    if size:
        scheme = scheme.with_weight(group_size=int(size))
    return scheme.with_weight(symmetric=False) if symmetry else scheme


def plain_layers(checkpoint: Checkpoint, scheme: Scheme) -> dict[str, Scheme]:
    """Every linear layer and fused expert tensor with that scheme."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    modules = linear_modules(classify(shapes, checkpoint.config))
    return {m.name: scheme for m in modules if m.kind in ("linear", "experts")}


def stream(source: Path, out: Path, scheme: str, **more: Any) -> StreamResult:
    """Stream every layer of `source`; `layout`, `clip`, `on_nan` become options."""
    checkpoint = open_checkpoint(source)
    names = ("layout", "clip", "on_nan")
    options = StreamOptions(**{name: more.pop(name) for name in names if name in more})
    out.mkdir(exist_ok=True)
    shutil.copy(source / "config.json", out)
    arguments = {"shard_size": 10**9, "device": "cpu", "jobs": 1, **more}
    layers = plain_layers(checkpoint, scheme_named(scheme))
    return stream_quantize(checkpoint, layers, out, options=options, **arguments)


def write_model(out: Path, shards: list[dict[str, torch.Tensor]], config: dict[str, Any]) -> Path:
    """A checkpoint of these shards, with an index."""
    out.mkdir(parents=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config))
    return out


def sharded(source: Path, out: Path, shards: int) -> Path:
    """A copy of a one-file model, its tensors dealt out in turn: fused groups are torn apart."""
    tensors = load_file(source / "model.safetensors")
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        parts[number % shards][name] = tensor
    return write_model(out, parts, json.loads((source / "config.json").read_text()))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found
