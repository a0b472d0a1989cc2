"""Kept tensors: finite, and what explains those that differ from the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from quantkit.checkpoint.directory import TensorInfo
from quantkit.checkpoint.tensors import count_nonfinite, read_tensor
from quantkit.formats.quantized import FLOAT_DTYPES, QuantizedCheckpoint
from quantkit.verification.findings import Finding, error
from quantkit.verification.weights.folds import MIN_FOLDED_CHANNELS, NormFold
from quantkit.verification.weights.layers import LayerCheck
from quantkit.verification.weights.ledger import Ledger, row_blocks

if TYPE_CHECKING:
    import torch

_BIAS_TOLERANCE = 0.02


def check_finite(subject: QuantizedCheckpoint) -> Iterator[Finding]:
    """NaN and infinity in tensors that belong to no quantized layer."""
    for name, tensor in subject.checkpoint.tensors.items():
        if name in subject.owned or tensor.dtype not in FLOAT_DTYPES:
            continue
        count = count_nonfinite(tensor)
        if count:
            yield error(
                "tensor.nonfinite",
                f"{name} holds {count} NaN or infinite values",
                "copy it from the source, or quantize again",
                name,
            )


def usable_folds(folds: Iterable[NormFold]) -> tuple[list[NormFold], list[Finding]]:
    """The norms that may be folded: enough channels changed, and none became zero."""
    usable, findings = [], []
    for fold in folds:
        if fold.changed < MIN_FOLDED_CHANNELS:
            continue
        usable.append(fold)
        if fold.impossible:
            findings.append(
                error(
                    "fold.mismatch",
                    f"{fold.norm} erases {fold.impossible} channels that the source's norm keeps",
                    "quantize again; no column can make up for a zero",
                    fold.norm,
                )
            )
    return usable, findings


def settle_altered(
    ledger: Ledger, folds: Iterable[NormFold], results: Mapping[str, LayerCheck]
) -> Iterator[Finding]:
    """Call every altered tensor folded where its partners confirm it, else report it."""
    by_norm = {fold.norm: fold for fold in folds}
    for name, (mine, theirs) in ledger.altered.items():
        module = name.rpartition(".")[0]
        fold, result = by_norm.get(module), results.get(module)
        if name.endswith(".bias"):
            explained = _bias_follows(mine, theirs, fold, result)
        elif fold is not None:
            bad = [m for m in fold.consumers if m not in results or not results[m].ok]
            explained = not bad
            if bad:
                yield error(
                    "fold.mismatch",
                    f"{name} differs from the source's, and {bad[0]} does not make up for it",
                    "quantize again; norm and weight must keep their product",
                    name,
                )
                continue
        else:
            explained = result is not None and result.ok
        if explained:
            ledger.states[theirs.name] = "folded"
        else:
            yield error(
                "ledger.altered",
                f"{name} should be as in the source: {_difference(mine, theirs)}",
                "copy the tensor from the source",
                name,
            )


def _bias_follows(
    mine: TensorInfo, theirs: TensorInfo, fold: NormFold | None, result: LayerCheck | None
) -> bool:
    """Whether a bias was scaled as its norm, or as the rows of its layer."""
    factor: torch.Tensor | None = None
    if fold is not None:
        factor = 1.0 / fold.factor
    elif result is not None and result.ok:
        factor = result.gain
    if factor is None or mine.shape != theirs.shape or factor.shape != mine.shape:
        return False
    target = read_tensor(theirs).float() * factor
    distance = (read_tensor(mine).float() - target).norm()
    return bool(distance <= _BIAS_TOLERANCE * target.norm())


def _difference(mine: TensorInfo, theirs: TensorInfo) -> str:
    if mine.shape != theirs.shape:
        return f"its shape is {list(mine.shape)}, there {list(theirs.shape)}"
    dtypes = "" if mine.dtype == theirs.dtype else f" ({mine.dtype} here, {theirs.dtype} there)"
    if mine.dtype not in FLOAT_DTYPES or theirs.dtype not in FLOAT_DTYPES:
        return f"its bytes differ{dtypes}"
    count, largest = 0, 0.0
    for own, other in zip(row_blocks(mine), row_blocks(theirs), strict=False):
        gap = (read_tensor(own).float() - read_tensor(other).float()).abs()
        count += int((gap != 0).sum())
        largest = max(largest, float(gap.max()))
    return f"{count} of {mine.elements} values differ, by {largest:.3g} at most{dtypes}"
