"""Biases of experts: the source holds those of all experts in one tensor, the checkpoint may hold
one a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantkit.checkpoint.tensors import read_tensor
from quantkit.formats.quantized import QuantizedCheckpoint
from quantkit.verification.weights.source import SourceModel, short_name

if TYPE_CHECKING:
    import torch

_LEAVES = {
    "gate_up_proj_bias": (("gate_proj", "up_proj"), ("w1", "w3"), ("gate_up_proj",)),
    "down_proj_bias": (("down_proj",), ("w2",)),
}
"""The fused tensor [experts, out] → the layers of one expert that may hold it."""


@dataclass(frozen=True)
class SplitBias:
    """A fused bias of the source, the biases of ours that it became, and those of other values."""

    source: str
    names: tuple[str, ...]
    different: tuple[str, ...]


def split_biases(subject: QuantizedCheckpoint, source: SourceModel) -> Iterator[SplitBias]:
    """Every fused bias of which each expert's part is in the checkpoint, in the source's order."""
    ours = subject.checkpoint.tensors
    full = {short_name(name): name for name in ours if name.endswith(".bias")}
    for name, theirs in source.checkpoint.tensors.items():
        parent, _, leaf = name.rpartition(".")
        if name in ours or leaf not in _LEAVES or len(theirs.shape) != 2:
            continue
        for leaves in _LEAVES[leaf]:
            wanted = [
                short_name(f"{parent}.{expert}.{part}.bias")
                for expert in range(theirs.shape[0])
                for part in leaves
            ]
            if not set(wanted) <= full.keys():
                continue
            names = tuple(full[short] for short in wanted)
            rows = [part for row in read_tensor(theirs) for part in _parts(row, leaves, source)]
            pairs = zip(names, rows, strict=True)
            different = tuple(own for own, row in pairs if not _holds(subject, own, row))
            yield SplitBias(name, names, different)
            break


def with_halves(subject: QuantizedCheckpoint, source: SourceModel) -> SourceModel:
    """The source, its `halves` set where the biases of ours show that rows were split so: Defuser
    (GPTQModel) does, and joins them again before it computes."""
    halved = replace(source, halves=True)
    if not source.interleaved or not any(b.different for b in split_biases(subject, source)):
        return source
    return source if any(b.different for b in split_biases(subject, halved)) else halved


def _parts(
    row: torch.Tensor, leaves: tuple[str, ...], source: SourceModel
) -> tuple[torch.Tensor, ...]:
    """The bias of one expert [out], for each of its layers."""
    if len(leaves) == 1:
        return (row,)
    if source.interleaved:
        return row[0::2], row[1::2]
    return row.chunk(2)


def _holds(subject: QuantizedCheckpoint, name: str, values: torch.Tensor) -> bool:
    """Whether our tensor holds the values, rounded to its dtype."""
    import torch

    target = read_tensor(subject.checkpoint.tensors[name])
    return target.shape == values.shape and torch.equal(target, values.to(target.dtype))
