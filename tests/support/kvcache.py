"""Checkpoints with a quantized key-value cache, made from ones without."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit.runtime.load import load
from tests.support.helpers import edit_json, edit_tensors

FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT8 = {**FP8, "type": "int"}


def with_cache(
    source: Path, out: Path, scales: Mapping[int, tuple[float, float]], scheme: Any = None
) -> Path:
    """A copy of a compressed-tensors checkpoint that declares a cache (FP8) with these scales of
    keys and values, by decoder layer."""
    shutil.copytree(source, out)
    (out / "quantkit.json").unlink(missing_ok=True)

    def declare(config: dict[str, Any]) -> None:
        config["quantization_config"]["kv_cache_scheme"] = scheme or FP8

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for index, pair in scales.items():
            for kind, value in zip("kv", pair, strict=True):
                tensors[f"model.layers.{index}.self_attn.{kind}_scale"] = torch.tensor([value])

    edit_json(out / "config.json", declare)
    edit_tensors(out, add)
    return out


def calibrated(source: Path, ids: torch.Tensor, work: Path) -> dict[int, tuple[float, float]]:
    """The scales that take the largest keys and values of `ids` to the end of FP8."""
    runtime = load(with_cache(source, work, {}), device="cpu")
    with runtime.cache_in_16_bit() as seen:
        runtime(ids)
    return {index: (held.keys / 448, held.values / 448) for index, held in seen.items()}
