"""Tensors of Transformers' module that a checkpoint holds joined, split or turned around.

Transformers' table of conversions (`transformers.conversion_mapping`) makes one from the other. The
experts of a file are not stacked: they stay one by one, and only get names of the module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

_LISTED = "*."
"""In a pattern of the table: the numbers of experts that one tensor of the module holds."""


@dataclass
class Conversion:
    """One use of a rule of the table: the file's tensors by the rule's pattern, and the names in
    the module of what it makes of them."""

    rule: Any
    target: str
    parts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def listed(self) -> bool:
        """Whether it stacks experts."""
        return any(_LISTED in pattern for pattern in self.parts)

    @property
    def makes(self) -> list[str]:
        """Names of the tensors in the module, in the order of the rule."""
        first, *_ = self.rule.target_patterns
        head, _, tail = self.target.partition(first)
        return [f"{head}{pattern}{tail}" for pattern in self.rule.target_patterns]

    def run(self, read: Callable[[str], torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """The tensors of the module, by name."""
        for pattern, names in self.parts.items():
            for name in names:
                self.rule.add_tensor(self.target, name, pattern, read(name))
        made = self.rule.convert(self.target, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def experts(self) -> Iterator[tuple[str, str]]:
        """Name in the module → in the file of experts that a rule divides among several modules."""
        blocks = [name.rpartition(".")[0] for name in self.makes]
        for pattern, names in self.parts.items():
            leaf = pattern.partition(_LISTED)[2]
            weights = sorted((n for n in names if n.endswith(f".{leaf}")), key=_numbers)
            size = -(-len(weights) // len(blocks))
            for index, name in enumerate(weights):
                yield f"{blocks[index // size]}.{index % size}.{leaf}", name


def conversions(
    model: Any, names: Iterable[str], rename: Callable[..., tuple[str, str | None]]
) -> list[Conversion]:
    """What the table makes of those tensors of a file; `rename` is that of `FileNames`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightConverter)]
    by_pattern = {pattern: rule for rule in reversed(rules) for pattern in rule.source_patterns}
    found: dict[str, Conversion] = {}
    for name in names:
        target, pattern = rename(name, rules)
        if pattern is not None:
            one = found.setdefault(target, Conversion(by_pattern[pattern], target))
            one.parts.setdefault(pattern, []).append(name)
    return list(found.values())


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
