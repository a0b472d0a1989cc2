"""Linear layers that, while gradients go back through them, note what each scheme would change.

With y = W x and a scheme's ŷ = Ŵ x̂ a layer's error is d = ŷ - y at every position. With g the
gradient at y of the log-likelihood of a token that the model itself drew, g·d is a sample of how
far the model's distribution moves, and half the mean of its square estimates the KL divergence to
second order: the Fisher information is the Hessian of KL (Amari, Natural Gradient Works
Efficiently in Learning, 1998; used so by ModelOpt's AutoQuantize and by SqueezeLLM,
arXiv:2306.07629). Errors at different positions are taken as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.backends.process.float32_products import linear
from quantkit.backends.streaming.rtn import absolute_maximum
from quantkit.checkpoint.network.modules import fused_groups
from quantkit.checkpoint.schemes import Scheme
from quantkit.runtime.loading.make_layers import LayerMaker
from quantkit.validation.search.rounding import rounded_input, rounded_weight


@dataclass
class Sums:
    """Over all positions: (g·d)², and squared errors |d|²."""

    moved: float = 0.0
    error: float = 0.0


@dataclass
class Notes:
    """What is asked of the watched layers, and what they found.

    asked: module → (its group, the schemes of that). sums: (group, scheme) → what was summed.
    signal: group → |y|².
    """

    asked: Mapping[str, tuple[str, Mapping[str, Scheme]]]
    apart: frozenset[str]
    """Groups whose members see positions of their own: experts."""
    sums: dict[tuple[str, str], Sums] = field(default_factory=dict)
    signal: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    """Module → the largest weight of what it is fused with."""
    products: int = 0
    """Multiply-adds of all matrix products of linear layers so far, attention's own aside."""
    _open: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def add(self, key: tuple[str, str], moved: torch.Tensor, error: float) -> None:
        """One module's g·d [positions] for one scheme; those of a fused group count together."""
        total = self.sums.setdefault(key, Sums())
        total.error += error
        if key[0] in self.apart:
            total.moved += float(moved.square().sum())
            return
        before = self._open.get(key)
        if before is not None and before.shape != moved.shape:
            total.moved += float(before.square().sum())
            before = None
        self._open[key] = moved if before is None else before + moved

    def counted(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y, the product of x with a weight, counted; and so will be its gradient's way back."""
        size = count(x, weight)

        def back(_gradient: torch.Tensor) -> None:
            self.products += size

        self.products += size
        if y.requires_grad:
            y.register_hook(back)  # type: ignore[no-untyped-call]
        return y

    def close(self) -> None:
        """The positions of one batch are done."""
        for key, moved in self._open.items():
            self.sums[key].moved += float(moved.square().sum())
        self._open.clear()


def module_of(name: str) -> str:
    """The module of the checkpoint: an expert's name less its number, a tensor's its suffix."""
    return name.partition("[")[0].removesuffix(".weight")


def count(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Multiply-adds of x [..., in] with weight [out, in]."""
    return x.numel() * weight.shape[0]


Tensors = tuple[torch.Tensor, torch.Tensor | None]
"""A weight [out, in], and a bias [out]."""


class Watched(nn.Module):
    """A 16-bit linear layer (or several of one input, one below the other).

    `read` gives its tensors; with `streamed` they are read when they are used, and held until
    `forget`.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        notes: Notes,
        read: Callable[[], Tensors],
        *,
        streamed: bool,
    ) -> None:
        super().__init__()
        self.names, self.shapes, self.notes = list(names), list(shapes), notes
        self.watching = False
        self._read, self._streamed = read, streamed
        self._held: Tensors | None = None if streamed else read()
        self._rounded: dict[tuple[int, str], torch.Tensor] = {}

    @property
    def tensors(self) -> Tensors:
        """Weight and bias, read if need be."""
        if self._held is None:
            self._held = self._read()
        return self._held

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]; some families' modules ask for it."""
        return self.tensors[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.watching and torch.is_grad_enabled() and x.requires_grad:
            result: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return result
        return self.notes.counted(x, self.weight, linear(x, *self.tensors))

    def note(self, x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor) -> None:
        """x [n, in], what came of it (bias and all) and the gradient of that, [n, out]."""
        start = 0
        for index, (name, (rows, _)) in enumerate(zip(self.names, self.shapes, strict=True)):
            part = slice(start, start + rows)
            start += rows
            group, schemes = self.notes.asked.get(module_of(name), ("", {}))
            if schemes:
                self._note(index, name, group, schemes, x, y[:, part], gradient[:, part], part)

    def _note(
        self,
        index: int,
        name: str,
        group: str,
        schemes: Mapping[str, Scheme],
        x: torch.Tensor,
        y: torch.Tensor,
        gradient: torch.Tensor,
        part: slice,
    ) -> None:
        whole_weight, bias = self.tensors
        weight, notes, g = whole_weight[part], self.notes, gradient.float()
        plain = y if bias is None else y - bias[part]
        notes.signal[group] = notes.signal.get(group, 0.0) + float(plain.float().square().sum())
        for title, scheme in schemes.items():
            key = (index, title)
            if key not in self._rounded:
                whole = rounded_weight(weight, scheme.weight, notes.largest.get(name))
                if scheme.input is None:
                    whole -= weight.float()
                self._rounded[key] = whole.to(weight.dtype)
            notes.products += count(x, weight)
            if scheme.input is None:
                error = linear(x, self._rounded[key]).float()
            else:
                error = linear(rounded_input(x, scheme.input), self._rounded[key]).float()
                error -= plain.float()
            moved = torch.linalg.vecdot(error, g)
            notes.add((group, title), moved, float(torch.linalg.vector_norm(error)) ** 2)

    def forget(self) -> None:
        """Let go of the rounded weights, and of the layer's own where they are streamed."""
        self._rounded.clear()
        if self._streamed:
            self._held = None


class _Product(torch.autograd.Function):
    """x [..., in] → x Wᵀ + b, noting on the way back."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, layer: Watched) -> torch.Tensor:
        y = linear(x, *layer.tensors)
        layer.notes.products += count(x, layer.weight)
        context.save_for_backward(x)
        context.layer, context.plain = layer, y.clone()  # some families change theirs in place
        return y

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = context.saved_tensors
        layer: Watched = context.layer
        rows = gradient.reshape(-1, gradient.shape[-1])
        with torch.no_grad():
            if len(rows):
                layer.note(x.reshape(-1, x.shape[-1]), context.plain.view(rows.shape), rows)
            back = linear(rows.to(layer.weight.dtype), layer.weight.T)
            layer.notes.products += count(x, layer.weight)
        return back.view(x.shape), None


@dataclass
class WatchingMaker(LayerMaker):
    """Makes the 16-bit layers of a checkpoint as watched ones."""

    notes: Notes = field(default_factory=lambda: Notes({}, frozenset()))
    streamed: bool = False
    """Whether layers are read when they are used, but for the experts of 3-D tensors."""

    def merged(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], bias: bool = False
    ) -> nn.Module:
        """See `LayerMaker.merged`."""
        if not self.streamed or any(name in self.source.layers for name in names):
            return super().merged(names, shapes, bias)
        read = partial(self._plain, list(names), list(shapes), bias)
        return Watched(names, shapes, self.notes, read, streamed=True)

    def plain(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> nn.Module:
        """See `LayerMaker.plain`."""
        return Watched(names, shapes, self.notes, lambda: (weight, bias), streamed=False)


def find_largest(model: nn.Module, notes: Notes) -> None:
    """Note the largest weight of every fused group, which sets NVFP4's global scale."""
    own: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, Watched):
            start = 0
            for name, (rows, _) in zip(module.names, module.shapes, strict=True):
                if module_of(name) in notes.asked:
                    own[name] = absolute_maximum(module.weight[start : start + rows].contiguous())
                start += rows
            module.forget()
    notes.largest = dict(own)
    for members in fused_groups(own):
        notes.largest |= dict.fromkeys(members, max(own[name] for name in members))
