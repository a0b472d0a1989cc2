"""What the tensors of Transformers' module are called in a checkpoint.

Published files keep the names of their time; Transformers' table of renamings
(`transformers.conversion_mapping`) leads from them to the names of its modules. Of what it stacks
or joins on the way (`conversions.py`), the experts of a file stay one by one.
"""

from __future__ import annotations

from typing import Any

import torch

from quantkit.runtime.loading.conversions import Conversion, conversions
from quantkit.runtime.loading.source import CheckpointReader


class FileNames:
    """`tensors`: name in the module → in the file; `modules` the same of what holds a `weight`, or
    is declared quantized; `made`: name in the module → what makes it of others in the file."""

    def __init__(self, model: Any, source: CheckpointReader) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        table = get_model_conversion_mapping(model)
        renamings = [rule for rule in table if isinstance(rule, WeightRenaming)]
        state = model.state_dict()

        def rename(name: str, rules: list[Any]) -> tuple[str, str | None]:
            return rename_source_key(name, renamings, rules, model.base_model_prefix, state)

        def inside(name: str) -> str:
            return rename(name, [])[0]

        # Rules that depend on each other (Kimi's norm0 and norm1) want the names in order.
        self.tensors = {inside(name): name for name in sorted(source.names)}
        self.modules = {
            _module(name): _module(held)
            for name, held in self.tensors.items()
            if held.endswith(".weight")
        }
        unknown = {held for name, held in self.tensors.items() if name not in state}
        for module, spec in source.layers.items():
            weight = f"{module}.weight"
            named = module if spec.experts and weight not in source.names else weight
            self.modules[_module(inside(named))] = module
            if inside(named) not in state:
                unknown.add(named)
        self.made: dict[str, Conversion] = {}
        for one in conversions(model, sorted(unknown), rename):
            if not one.listed:
                self.made |= dict.fromkeys(one.makes, one)
            elif len(one.makes) > 1:
                self.modules |= {_module(name): _module(held) for name, held in one.experts()}
        self._model = model
        self._source = source
        self._ready: dict[str, torch.Tensor] = {}

    def tensor(self, name: str) -> str:
        """The file's name of a tensor; the module's own where the file has none."""
        return self.tensors.get(name, name)

    def module(self, name: str) -> str:
        """The file's name of a module; its own where the file has none."""
        return self.modules.get(name, name)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A 16- or 32-bit tensor of the module in `dtype`; raises InputError as
        `CheckpointReader.plain` does."""
        stored = self.tensor(name)
        if name in self._ready:
            return self._ready.pop(name)
        if name not in self.made or self._source.has(stored):
            return self._source.plain(stored, shape, dtype)
        made = self.made[name].run(lambda part: self._source.plain(part, None, dtype), self._model)
        self._ready |= made
        return self._ready.pop(name)


def _module(name: str) -> str:
    return name.removesuffix(".weight")
