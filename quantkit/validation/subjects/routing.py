"""Which experts the routers of a model choose, seen where the experts are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.network.modules import layer_index

if TYPE_CHECKING:
    import torch
    from torch import nn


class Routes:
    """What the routers chose since the watch began, by decoder layer."""

    def __init__(self) -> None:
        self._calls: dict[int, list[torch.Tensor]] = {}

    @property
    def layers(self) -> list[int]:
        """The decoder layers that have experts and were seen."""
        return list(self._calls)

    def add(self, layer: int, chosen: torch.Tensor) -> None:
        self._calls.setdefault(layer, []).append(chosen.int().cpu())

    def table(self, windows: NDArray[np.int64]) -> NDArray[np.int32] | None:
        """The experts of every token, sorted: [layers, n, length, k]; None where none were seen,
        or layers choose unequally many."""
        import torch

        found = [torch.cat(calls).sort(-1).values.numpy() for calls in self._calls.values()]
        if not found or any(one.shape != found[0].shape for one in found):
            return None
        return np.stack(found).reshape(len(found), *windows.shape, -1)


@contextmanager
def watch_routers(model: nn.Module) -> Iterator[Routes]:
    """Note every choice of experts inside the block, in the order of the tokens."""
    from quantkit.runtime.network.experts import GroupedExperts, PaddedExperts

    routes = Routes()

    def grouped(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            _, chosen, _ = (*args, *named.values())
            routes.add(layer, chosen.reshape(-1, chosen.shape[-1]))

        return hook

    def padded(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], _named: dict[str, Any]) -> None:
            assert isinstance(module, PaddedExperts)
            routes.add(layer, module.chosen(*args))

        return hook

    hooks = []
    for name, module in model.named_modules():
        makes = {GroupedExperts: grouped, PaddedExperts: padded}.get(type(module))
        if makes is not None:
            hook = makes(layer_index(name) or 0)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield routes
    finally:
        for handle in hooks:
            handle.remove()
