"""The contract of a grouped kernel: the experts of a layer, each on the tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from quantkit.runtime.linear.modules import PlainLinear, QuantLinear

Activation = Callable[[torch.Tensor], torch.Tensor]
"""What the first layer of an expert gives, [n, its width] → what the second takes."""


class GroupedKernel(Protocol):
    """What each file of this folder provides, as module-level names.

    No call may wait for the GPU: a step of the decoder is captured with it.
    """

    NAME: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing of this kernel runs on the device, or None."""

    def rejects(self, layers: Sequence[nn.Module]) -> str | None:
        """Why this kernel cannot compute one layer of all experts, or None."""

    def prepare(self, layers: Sequence[nn.Module]) -> Any:
        """One layer of all experts, stacked: a NamedTuple of tensors and numbers."""

    def apply(
        self,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        layers: tuple[Any, Any],
        activation: Activation,
    ) -> torch.Tensor:
        """hidden [tokens, in], chosen and weights [tokens, k] → the weighted sum of what the
        experts make of each token, [tokens, in]; `layers` is the first and the second prepared."""


class Sorted(NamedTuple):
    """Every token once for each of its experts, an expert's rows together.

    `order` [tokens × k] is the place of each row in `chosen`; `experts` [tokens × k] its expert;
    `ends` int32 [experts] is where the rows of each end.
    """

    order: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor


Multiply = Callable[[torch.Tensor, Sorted], torch.Tensor]
"""Rows [n, in] sorted as that says → [n, out], each by the layer of its expert."""


def sort_by_expert(chosen: torch.Tensor, count: int) -> Sorted:
    """The rows of `chosen` [tokens, k] by expert, of which there are `count`."""
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(count, device=chosen.device, dtype=experts.dtype)
    return Sorted(order, experts, torch.searchsorted(experts, numbers, right=True).int())


def weighted_sum(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows [tokens × k, out] in sorted order → their weighted sums [tokens, out], in float32 until
    the end."""
    parts = torch.empty_like(rows)
    parts[order] = rows
    tokens, k = weights.shape
    summed = torch.einsum("tko,tk->to", parts.view(tokens, k, -1).float(), weights.float())
    return summed.to(rows.dtype)


def one_after_the_other(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    layers: tuple[Multiply, Multiply],
    activation: Activation,
) -> torch.Tensor:
    """`GroupedKernel.apply` of `count` experts by two products over rows that are sorted."""
    first, second = layers
    rows = sort_by_expert(chosen, count)
    taken = hidden.index_select(0, rows.order // chosen.shape[-1])
    middle = activation(first(taken, rows)).contiguous()
    return weighted_sum(second(middle, rows), rows.order, weights)


def alike(layers: Sequence[nn.Module], kernel: str) -> str | None:
    """Why the layers are not all computed by the kernel for one matrix (""; 16 bit) and no more,
    or None."""
    for layer in layers:
        if isinstance(layer, PlainLinear):
            name, more = "", layer.bias is not None
        elif isinstance(layer, QuantLinear):
            name = layer.choice.kernel.NAME
            more = any(one is not None for one in (layer.bias, layer.order, layer.multiplier))
        else:
            return f"computes no {type(layer).__name__}"
        if name != kernel:
            return f"takes layers of {kernel or '16 bit'}, not of {name or '16 bit'}"
        if more:
            return "computes no biases, no act-order and no scaled inputs"
    return None
