"""Tensors written to a directory as safetensors shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def write_shards(target: Path, tensors: Iterable[tuple[str, torch.Tensor]], size: int) -> None:
    """Write named tensors to `target` as shards of about `size` bytes with their index, or as
    `model.safetensors` where there is one shard; memory holds one."""
    from safetensors.torch import save_file

    held: dict[str, torch.Tensor] = {}
    shards: list[tuple[Path, list[str]]] = []
    total = 0

    def flush() -> None:
        file = target / f"{len(shards)}.safetensors"
        save_file(held, file, metadata={"format": "pt"})
        shards.append((file, list(held)))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        total += tensor.nbytes
        if sum(one.nbytes for one in held.values()) >= size:
            flush()
    if held:
        flush()
    if len(shards) == 1:
        shards[0][0].rename(target / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, (file, names) in enumerate(shards, 1):
        final = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        file.rename(target / final)
        weight_map |= dict.fromkeys(names, final)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")
