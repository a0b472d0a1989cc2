"""Settings that say a checkpoint is quantized: two that contradict each other, and leftovers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantkit.checkpoint.network.fused_experts import FUSED_EXPERTS
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.checkpoint.directory import Checkpoint

SIDE_METHODS: dict[str, tuple[str, ...]] = {
    "hf_quant_config.json": ("modelopt", "modelopt_fp4", "modelopt_fp8", "modelopt_mixed"),
}
"""Files beside config.json that say by their name alone what wrote them → its `quant_method`s."""

_QUANTIZED_DTYPES = {"F8_E4M3": "FP8", "F8_E5M2": "FP8", "F4": "FP4", "I8": "INT8", "U8": "4 bit"}
_QUANTIZED_SUFFIXES = (
    "weight_scale", "weight_scale_inv", "weight_packed", "weight_blocks", "qweight", "qzeros",
    "weight_scale_2", "absmax", "SCB", "weight_offset", "gate_up_proj_blocks", "down_proj_blocks",
)  # fmt: skip
_FLOATS = ("BF16", "F16", "F32", "F64")

REMOVE = (
    'import json, pathlib, sys; d = pathlib.Path(sys.argv[1]); f = d / "config.json"; '
    'c = json.loads(f.read_text(encoding="utf-8")); '
    '[p.pop(k, None) for p in (c, c.get("text_config") or {}) '
    'for k in ("quantization_config", "compression_config")]; '
    't = json.dumps(c, indent=2); f.unlink(); f.write_text(t, encoding="utf-8"); '
    "[(d / n).unlink() for n in sys.argv[2:]]"
)
"""Arguments: the directory, and the files beside config.json that are to go too."""


def quantized_tensor(checkpoint: Checkpoint) -> str | None:
    """The first tensor whose name or dtype is that of a quantized weight, in a few words."""
    for name, info in checkpoint.tensors.items():
        suffix = name.rpartition(".")[2]
        if suffix in _QUANTIZED_SUFFIXES:
            return f"tensor {name}"
        is_weight = suffix == "weight" or suffix in FUSED_EXPERTS
        if is_weight and info.dtype in _QUANTIZED_DTYPES:
            return f"{_QUANTIZED_DTYPES[info.dtype]} tensor {name}"
    return None


def refuse_conflict(checkpoint: Checkpoint) -> None:
    """InputError (`format.contradiction`) where config.json names one method and a file beside it
    is of another: engines read one or the other."""
    config = checkpoint.quantization_config or {}
    method = str(config.get("quant_method") or "").lower()
    for file, methods in SIDE_METHODS.items():
        document = checkpoint.documents.get(file)
        if not method or document is None or method in methods:
            continue
        inner = document.get("quantization")
        inner = inner if isinstance(inner, dict) else document
        theirs = f"{methods[0]} {inner.get('quant_algo') or ''}".rstrip()
        fits = "config.json" if _described_by(method, checkpoint) else file
        wrong = file if fits == "config.json" else "quantization_config in config.json"
        raise InputError(
            f"{checkpoint.path} has two configurations that contradict each other: "
            f"quantization_config in config.json says quant_method {method!r}, {file} says "
            f"{theirs}. Engines read one or the other.",
            hint=f"remove the one that the weights do not fit (by their names {wrong}), or export "
            "the checkpoint again",
            code="format.contradiction",
        )


def _described_by(method: str, checkpoint: Checkpoint) -> bool:
    """Whether the tensors are named as config.json's method names them, not as ModelOpt does."""
    suffixes = {name.rpartition(".")[2] for name in checkpoint.tensors}
    if method == "fp8":
        return "weight_scale_inv" in suffixes
    return "weight_scale_2" not in suffixes and not {"weight_packed", "qweight"}.isdisjoint(
        suffixes
    )


def refuse_stale(checkpoint: Checkpoint) -> None:
    """InputError (`format.stale_settings`) for settings of a quantization over weights that are
    all 16 bit or wider, left over from training or from another export."""
    where = list(_stated(checkpoint))
    known = checkpoint.derived != "config.json"
    if not where or not known or quantized_tensor(checkpoint):
        return
    if any(info.dtype not in _FLOATS for info in checkpoint.tensors.values() if info.shape[1:]):
        return
    config = checkpoint.quantization_config or {}
    method = config.get("quant_method") or ("no quant_method" if config else "no settings")
    files = [name for name in where if name != "config.json"]
    command = [sys.executable, "-c", REMOVE, str(checkpoint.path), *files]
    raise InputError(
        f"{checkpoint.path} has stale quantization settings ({' and '.join(where)}: {method}): all "
        f"{len(checkpoint.tensors)} tensors are 16 bit or wider, and none has scales. They are a "
        "leftover, and engines that trust them fail.",
        hint=f"remove the leftover settings: {shlex.join(command)}",
        code="format.stale_settings",
    )


def _stated(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.quantization_config is not None:
        yield "config.json"
    yield from checkpoint.documents
