"""What the tensors of Transformers' module are called in a checkpoint.

Published files keep the names of their time; Transformers' table of renamings
(`transformers.conversion_mapping`) leads from them to the names of its modules. What it stacks or
joins on the way is not followed here: the experts of a file stay one by one.
"""

from __future__ import annotations

from typing import Any

from quantkit.runtime.loading.source import CheckpointReader


class FileNames:
    """`tensors`: name in the module → in the file; `modules` the same of what holds a `weight`, or
    is declared quantized."""

    def __init__(self, model: Any, source: CheckpointReader) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        table = get_model_conversion_mapping(model)
        renamings = [rule for rule in table if isinstance(rule, WeightRenaming)]
        state = model.state_dict()

        def renamed(name: str) -> str:
            return rename_source_key(name, renamings, [], model.base_model_prefix, state)[0]

        self.tensors = {renamed(name): name for name in source.names}
        self.modules = {
            name.removesuffix(".weight"): held.removesuffix(".weight")
            for name, held in self.tensors.items()
            if held.endswith(".weight")
        }
        for module, spec in source.layers.items():
            weight = f"{module}.weight"
            named = module if spec.experts and weight not in source.names else weight
            self.modules[renamed(named).removesuffix(".weight")] = module

    def tensor(self, name: str) -> str:
        """The file's name of a tensor; the module's own where the file has none."""
        return self.tensors.get(name, name)

    def module(self, name: str) -> str:
        """The file's name of a module; its own where the file has none."""
        return self.modules.get(name, name)
