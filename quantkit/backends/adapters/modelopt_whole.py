"""Experts that ModelOpt takes apart by their class, where the plan leaves them in 16 bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry

from quantkit.backends.adapters.places import Place, fused_tensors


class _AsItIs(QuantModule):  # type: ignore[misc]
    """A module that is converted into itself: its weights, names and products stay."""

    def _setup(self) -> None:
        """Nothing is taken apart."""


def leave_whole(model: torch.nn.Module, found: Mapping[str, Place]) -> None:
    """Have the library convert nothing of experts with weights of their own kind (DBRX has those of
    all experts one below the other) in which no layer is planned.

    Fused 3-D experts, whose quantizers are switched off one by one, are left to that.
    """
    planned = {place.module for place in found.values()}
    above = {name[:end] for name in planned for end, at in enumerate(name) if at == "."}
    fused = set(fused_tensors(model))
    for name, module in model.named_modules():
        own = {leaf for leaf, weight in module.named_parameters(recurse=False) if weight.dim() > 1}
        if not own - {"weight"} or name in fused:
            continue
        holder = name
        while holder and holder not in planned | above:
            _convert_into_itself(type(model.get_submodule(holder)))
            holder = holder.rpartition(".")[0]


def _convert_into_itself(kind: type[torch.nn.Module]) -> None:
    """Replace the library's conversion of this class, if it has one of its own."""
    known = QuantModuleRegistry.get(kind)
    if known is None or issubclass(known, _AsItIs):
        return
    QuantModuleRegistry.unregister(kind)
    QuantModuleRegistry.register({kind: kind.__name__})(_AsItIs)
