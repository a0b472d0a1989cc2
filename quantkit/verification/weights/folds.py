"""Folds: scales that a method moves out of one weight and into a neighbour, leaving the product.

AWQ and SmoothQuant divide a norm by s and multiply the columns of the layers that read it; AWQ
also divides rows of v_proj (up_proj) and multiplies columns of o_proj (down_proj). The norm is
stored, so its s is known; the rows' s is what fits best, and the second layer has to confirm it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quantkit.checkpoint.directory import TensorInfo
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.modules import Module, layer_index
from quantkit.checkpoint.network.norm_readers import norm_readers
from quantkit.checkpoint.tensors import read_tensor
from quantkit.formats.quantized import QuantizedCheckpoint

if TYPE_CHECKING:
    import torch

Folding = Literal["never", "declared", "possible"]
"""Whether the checkpoint's method rewrites kept tensors: it does not, it does, nobody says."""

MIN_FOLDED_CHANNELS = 0.25
"""A norm of which fewer channels changed was damaged, not folded."""

_FINAL_NORMS = {"norm", "final_layernorm", "final_layer_norm", "ln_f"}
_ROW_PAIRS = (
    ("v_proj", "o_proj"), ("v_proj", "out_proj"), ("v_proj", "dense"), ("qkv_proj", "o_proj"),
    ("wv", "wo"), ("up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("w3", "w2"),
    ("fc1", "fc2"),
)  # fmt: skip


@dataclass(frozen=True)
class NormFold:
    """A norm that differs from the source's, and the modules whose columns must make up for it.

    `factor` is float32 [hidden]: what the columns were multiplied by; `impossible` counts channels
    that no factor explains (the norm became zero or is not finite).
    """

    norm: str
    consumers: tuple[str, ...]
    factor: torch.Tensor
    changed: float
    impossible: int


def norm_folds(
    subject: QuantizedCheckpoint, altered: Mapping[str, tuple[TensorInfo, TensorInfo]]
) -> list[NormFold]:
    """The altered norms of `altered` (ours and the source's, by name) that feed linear layers."""
    folds = []
    for name, (mine, theirs) in altered.items():
        norm = name.removesuffix(".weight")
        consumers = _consumers(norm, subject.modules) if name.endswith(".weight") else ()
        if consumers and mine.shape == theirs.shape and len(mine.shape) == 1:
            folds.append(_fold(norm, consumers, mine, theirs, subject.checkpoint.config))
    return folds


def _fold(
    norm: str,
    consumers: tuple[str, ...],
    mine: TensorInfo,
    theirs: TensorInfo,
    config: Mapping[str, Any],
) -> NormFold:
    import torch

    offset = family(config).norm_offset
    new, old = read_tensor(mine).float() + offset, read_tensor(theirs).float() + offset
    factor = torch.where(new == old, 1.0, old / new)
    impossible = ~torch.isfinite(factor) | ((factor == 0) & (new != 0))
    changed = float((new != old).float().mean())
    factor = torch.where(impossible, 1.0, factor)
    return NormFold(norm, consumers, factor, changed, int(impossible.sum()))


def _consumers(norm: str, modules: Mapping[str, Module]) -> tuple[str, ...]:
    """The linear modules that read a norm's output; of the last norm that is the head."""
    leaf = norm.rpartition(".")[2]
    if layer_index(norm) is None:
        heads = [name for name, module in modules.items() if module.kind == "head"]
        return tuple(heads) if leaf in _FINAL_NORMS else ()
    return norm_readers(norm, modules)


def row_pairs(modules: Collection[str]) -> list[tuple[str, str]]:
    """Modules of which the first's output rows may be folded into the second's input columns."""
    present = set(modules)
    found = []
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for first, second in _ROW_PAIRS:
            if leaf == second and f"{parent}.{first}" in present:
                found.append((f"{parent}.{first}", name))
    return found


def to_columns(rows: torch.Tensor, columns: int, head_dim: int) -> torch.Tensor | None:
    """Row factors [out] of the first of a pair → what they do to the columns [in] of the second.

    Fused projections end with the rows that count; grouped-query attention repeats each value
    head for the query heads that share it. None when the shapes do not fit.
    """
    import torch

    if rows.numel() > columns:
        rows = rows[-columns:]
    if rows.numel() < columns:
        heads, repeats = rows.numel() // head_dim, columns // rows.numel()
        if rows.numel() % head_dim or columns % rows.numel():
            return None
        rows = rows.view(heads, 1, head_dim).expand(heads, repeats, head_dim).reshape(-1)
    return torch.where(rows != 0, 1.0 / rows, 1.0)


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of an attention head, by the config."""
    text = text_config(config)
    stated = text.get("v_head_dim") or text.get("head_dim")
    if isinstance(stated, int):
        return stated
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 1
