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
from quantkit.checkpoint.tensors import read_tensor
from quantkit.formats.quantized import QuantizedCheckpoint

if TYPE_CHECKING:
    import torch

Folding = Literal["never", "declared", "possible"]
"""Whether the checkpoint's method rewrites kept tensors: it does not, it does, nobody says."""

MIN_FOLDED_CHANNELS = 0.25
"""A norm of which fewer channels changed was damaged, not folded."""

_ATTENTION_NORMS = {"input_layernorm", "self_attn_layer_norm", "ln_1", "attention_norm"}
_MLP_NORMS = {
    "post_attention_layernorm", "pre_feedforward_layernorm", "ln_2", "ffn_norm",
    "final_layer_norm", "pre_mlp_layernorm",
}  # fmt: skip
_ATTENTION_INPUTS = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa", "c_attn", "wq",
    "wk", "wv", "query_key_value", "W_pack", "in_proj", "in_proj_qkv", "in_proj_z", "in_proj_b",
    "in_proj_a", "in_proj_qkvz", "in_proj_ba", "wqkv",
}  # fmt: skip
_MLP_INPUTS = {
    "gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "w1", "w3", "gate", "router",
    "shared_expert_gate", "dense_h_to_4h",
}  # fmt: skip
_FINAL_NORMS = {"norm", "final_layernorm", "final_layer_norm", "ln_f"}
_OWN_INPUTS = {"q_a_layernorm": {"q_b_proj"}, "kv_a_layernorm": {"kv_b_proj"}}
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
    """The linear modules that read a norm's output, by the names of Llama, GPT and OPT kin."""
    layer, _, leaf = norm.rpartition(".")
    if layer_index(norm) is None:
        heads = [name for name, module in modules.items() if module.kind == "head"]
        return tuple(heads) if leaf in _FINAL_NORMS else ()
    inside = [m for m in modules if m.startswith(f"{layer}.")]
    norms = {m.rpartition(".")[2] for m in inside}
    if leaf in _OWN_INPUTS:
        leaves = _OWN_INPUTS[leaf]
    elif leaf == "post_attention_layernorm" and "pre_feedforward_layernorm" in norms:
        return ()  # Gemma 2 and 3: applied after attention, read by no linear layer
    elif leaf in _ATTENTION_NORMS:
        parallel = norms.isdisjoint(_MLP_NORMS)
        leaves = _ATTENTION_INPUTS | _MLP_INPUTS if parallel else _ATTENTION_INPUTS
    elif leaf in _MLP_NORMS:
        leaves = _MLP_INPUTS
    else:
        return ()
    return tuple(m for m in inside if m.rpartition(".")[2] in leaves)


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
