"""The experts of a mixture, each read once in a pass over the tokens that the router gave it.

Transformers' own modules route; these stand where its experts stood, and take what those took.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from quantkit.runtime.linear.grouped.base import Activation
from quantkit.runtime.linear.grouped.select import Grouped


class Experts(nn.Module):
    """ups, downs: the first layer (gate and up in one) and the second of every expert."""

    def __init__(
        self, ups: Sequence[nn.Module], downs: Sequence[nn.Module], activation: Activation
    ) -> None:
        super().__init__()
        self.ups, self.downs = nn.ModuleList(ups), nn.ModuleList(downs)
        self.activation = activation

    def expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, hidden] → what that expert makes of them, [n, hidden]."""
        given: torch.Tensor = self.downs[number](self.activation(self.ups[number](rows)))
        return given


class GroupedExperts(Experts):
    """Experts that are called with the tokens, and for each the experts of its choice and their
    weights.

    Numbers beyond theirs are experts that give a token back as it came (LongCat's zero experts).
    Where `grouped` holds them, `ups` and `downs` are empty.
    """

    def __init__(
        self,
        ups: Sequence[nn.Module],
        downs: Sequence[nn.Module],
        activation: Activation,
        grouped: Grouped | None = None,
    ) -> None:
        super().__init__(() if grouped else ups, () if grouped else downs, activation)
        self.grouped = grouped

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [..., hidden], chosen and weights [tokens, k] → the weighted sum, like hidden.

        Sums are made in float32.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.grouped is not None:
            summed: torch.Tensor = self.grouped(rows, chosen, weights, self.activation)
            return summed.view(hidden.shape)
        result = torch.zeros_like(rows, dtype=torch.float32)
        if len(rows) == 1:
            for number, weight in zip(chosen.flatten().tolist(), weights.flatten(), strict=True):
                result.add_(self.expert(number, rows) * weight)
            return result.to(hidden.dtype).view(hidden.shape)
        order = chosen.flatten().argsort(stable=True)
        tokens = order // chosen.shape[-1]
        ordered = weights.flatten()[order].unsqueeze(-1)
        start = 0
        for number, count in enumerate(chosen.flatten().bincount().tolist()):
            if count:
                part = slice(start, start + count)
                given = self.expert(number, rows.index_select(0, tokens[part])) * ordered[part]
                result.index_add_(0, tokens[part], given.float())
                start += count
        return result.to(hidden.dtype).view(hidden.shape)

    def expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        return super().expert(number, rows) if number < len(self.ups) else rows


class PaddedExperts(Experts):
    """Experts that are called with all tokens once for each expert, scaled by the router; what it
    did not choose is zero (Llama 4)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[experts × tokens, hidden], an expert's tokens together → the same shape."""
        result = torch.zeros_like(hidden)
        inputs = hidden.view(len(self.ups), -1, hidden.shape[-1])
        outputs = result.view(inputs.shape)
        for number, row in enumerate(inputs.any(-1)):
            taken = row.nonzero().flatten()
            if len(taken):
                rows = inputs[number].index_select(0, taken)
                outputs[number].index_copy_(0, taken, self.expert(number, rows))
        return result

    def chosen(self, hidden: torch.Tensor) -> torch.Tensor:
        """The experts of every token, [tokens, k]."""
        taken = hidden.view(len(self.ups), -1, hidden.shape[-1]).any(-1).T
        most = int(taken.sum(-1).amax())
        return taken.byte().topk(most).indices


class SortedExperts(nn.Module):
    """One layer of all experts, called with tokens that are sorted by expert (JetMoE, Aria)."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, inputs: torch.Tensor, sizes: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """inputs [n, in] and how many of them are each expert's → [n, out]."""
        counts = sizes.tolist() if isinstance(sizes, torch.Tensor) else list(sizes)
        parts = zip(self.linears, torch.split(inputs, counts), strict=True)
        return torch.cat([linear(part) for linear, part in parts if len(part)])
