"""The blocks of experts of a lean decoder: Transformers' own, with the checkpoint's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.runtime.loading.experts import find_experts
from quantkit.runtime.loading.hosted import empty_model, fill_parameters, replace_layers
from quantkit.runtime.loading.make_layers import LayerMaker
from quantkit.runtime.loading.names import FileNames


class Mixtures:
    """Makes the blocks of one model, each when it is asked for."""

    def __init__(self, config: Any, maker: LayerMaker) -> None:
        self._model = empty_model(config, maker.source.checkpoint.path, maker.dtype)
        self._maker = maker
        self._names = FileNames(self._model, maker.source)
        self._experts = list(find_experts(self._model))

    def block(self, name: str) -> nn.Module | None:
        """The block of that name, which routes and computes; None where the layer is dense.

        Raises InputError as `LayerMaker` does.
        """
        part = f"{name}."
        if not any(experts.startswith(part) for experts in self._experts):
            return None
        replace_layers(self._model, self._maker, self._names, part)
        fill_parameters(self._model, self._maker, self._names, part)
        made = self._model.get_submodule(name)
        self._model.set_submodule(name, nn.Identity())
        return HostedBlock(made.eval())


class HostedBlock(nn.Module):
    """Transformers' module behind the interface of `mlp.Mlp`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] → the same shape."""
        result: torch.Tensor = self.module(x.view(-1, 1, x.shape[-1]))
        return result.view(x.shape)
