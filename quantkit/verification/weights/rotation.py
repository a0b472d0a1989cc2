"""Rotated checkpoints: the hidden state turned by an orthogonal matrix R (QuaRot, SpinQuant).

Embeddings become E R, layers that read the hidden state W R, layers that write it Rᵀ W, with the
norms between folded into their readers; value heads may be turned once more by a matrix of their
own that o_proj turns back. R is stored nowhere: E and E R give it, all layers must agree with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.checkpoint.directory import TensorInfo
from quantkit.checkpoint.tensors import read_tensor
from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import dequantize
from quantkit.formats.quantized import QuantizedCheckpoint
from quantkit.verification.weights.compare import Sums
from quantkit.verification.weights.folds import head_dim
from quantkit.verification.weights.layers import Weights
from quantkit.verification.weights.ledger import row_blocks

if TYPE_CHECKING:
    import torch

SAMPLE = 512
"""Rows or columns of a layer that are compared; turning all of them would cost far more."""

_MIN_SQNR_DB = 30.0
_WRITERS = ("o_proj", "out_proj", "down_proj", "w2", "fc2", "c_proj")


@dataclass(frozen=True)
class RotatedWeights(Weights):
    """`Weights` of a checkpoint whose hidden state is turned by `rotation` [hidden, hidden]."""

    rotation: torch.Tensor

    def compare(
        self,
        module: str,
        weight: QuantWeight,
        source: torch.Tensor,
        *,
        rows: torch.Tensor | None = None,  # noqa: ARG002
        columns: torch.Tensor | None = None,  # noqa: ARG002
        unclipped: bool = False,  # noqa: ARG002
    ) -> Sums:
        """As `Weights.compare`; a turned layer has no row folds, and its clipped codes count."""
        actual, target = dequantize(weight), source.float()
        leaf = module.rpartition(".")[2]
        if leaf in _WRITERS:
            turn = self._head_rotation(module) if leaf in ("o_proj", "out_proj") else None
            chosen = _spread(actual.shape[1])
            if turn is not None:
                heads = target.view(target.shape[0], -1, turn.shape[0])
                target = (heads @ turn).reshape(target.shape)
            return _sums(self.rotation.T @ target[:, chosen], actual[:, chosen])
        if module in self.columns:
            target = target * self.columns[module]
        if leaf == "v_proj" and (turn := self._solve_heads(target, actual)) is not None:
            target = (turn.T @ target.view(-1, turn.shape[0], target.shape[1])).flatten(0, 1)
        chosen = _spread(actual.shape[0])
        return _sums(target[chosen] @ self.rotation, actual[chosen])

    def _head_rotation(self, module: str) -> torch.Tensor | None:
        """The matrix of the value heads that feed an o_proj, from the v_proj beside it."""
        value = f"{module.rpartition('.')[0]}.v_proj"
        source = self._source(value, None) if value in self.subject.parts else None
        if source is None:
            return None
        actual = dequantize(self._weight(value, self._tensors(value), None))
        return self._solve_heads(source.float() * self.columns.get(value, 1.0), actual)

    def _solve_heads(self, target: torch.Tensor, actual: torch.Tensor) -> torch.Tensor | None:
        """The orthogonal matrix that the value heads share (Procrustes), None for none."""
        import torch

        size = head_dim(self.subject.checkpoint.config)
        if target.shape[0] % size:
            return None
        heads = (target @ self.rotation).view(-1, size, target.shape[1])
        mixed = torch.einsum("hic,hjc->ij", heads, actual.view(-1, size, actual.shape[1]))
        turn = _nearest_orthogonal(mixed)
        still = float(turn.diagonal().mean()) > 0.9
        return None if still else turn


def find_rotation(
    subject: QuantizedCheckpoint, altered: Mapping[str, tuple[TensorInfo, TensorInfo]]
) -> tuple[torch.Tensor, str] | None:
    """R and the embedding that shows it; None unless R explains the whole embedding."""
    for name, (mine, theirs) in altered.items():
        module = subject.modules.get(name.removesuffix(".weight"))
        if module is None or module.kind != "embedding" or mine.shape != theirs.shape:
            continue
        rotation = _solve(mine, theirs)
        if rotation is not None and _same_lengths(mine, theirs):
            return rotation, name
    return None


def _solve(mine: TensorInfo, theirs: TensorInfo) -> torch.Tensor | None:
    """The orthogonal R with E R = E', from four rows a column; None when there is none."""
    import torch

    hidden = theirs.shape[1]
    picked = _spread(theirs.shape[0], 4 * hidden)
    before, after = (read_tensor(info)[picked].float() for info in (theirs, mine))
    if before.shape[0] < hidden:
        return None
    best = torch.linalg.lstsq(before, after).solution
    rotation = _nearest_orthogonal(best)
    explained = _sums(before @ rotation, after).sqnr_db
    return rotation if explained >= _MIN_SQNR_DB else None


def _same_lengths(mine: TensorInfo, theirs: TensorInfo) -> bool:
    """Whether every row kept its length, as it must when turned."""
    for own, other in zip(row_blocks(mine), row_blocks(theirs), strict=True):
        before, after = (read_tensor(info).float().norm(dim=1) for info in (other, own))
        if bool(((after - before).abs() > 0.02 * before + 1e-6).any()):
            return False
    return True


def _nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    left, _, right = torch.linalg.svd(matrix)
    result: torch.Tensor = left @ right
    return result


def _spread(count: int, sample: int = SAMPLE) -> torch.Tensor:
    """At most `sample` indices, evenly spread over `count`."""
    import torch

    if count <= sample:
        return torch.arange(count)
    return torch.linspace(0, count - 1, sample).round().long()


def _sums(target: torch.Tensor, actual: torch.Tensor) -> Sums:
    products = (target * target, target * actual, actual * actual)
    first, second, third = (product.sum(1, keepdim=True) for product in products)
    return Sums(first, second, third, None)
