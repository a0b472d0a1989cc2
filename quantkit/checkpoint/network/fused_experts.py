"""Tensors that hold one layer of every expert of a block: whose they are, and what the layers of a
single expert are called (by engines, and where experts are stored one by one)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_PAIR, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)
_PARAMETERS = {
    "gate_up_proj": _PAIR,
    "down_proj": _DOWN,
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
}
_MODULES = {"fc1": _PAIR, "fc2": _DOWN}
"""Aria's, inside of the block."""
_BESIDE = {"input_linear": _PAIR, "output_linear": _DOWN}
"""Granite's, beside the router; JetMoE's attention has some of the same name and another use."""

FUSED_EXPERTS = tuple(_PARAMETERS)
"""Last name parts of those that are stored without a `.weight`."""
FUSED_LEAVES = (*_PARAMETERS, *_BESIDE)
"""Last name parts that mean experts wherever a 3-D tensor has them."""


@dataclass(frozen=True)
class FusedLayer:
    """block: the experts, as engines call them (`….experts`). leaves: the layers of one expert that
    its rows are, from the first on, in equal parts."""

    block: str
    leaves: tuple[str, ...]

    def names(self, expert: int) -> list[str]:
        """The layers of one expert."""
        return [f"{self.block}.{expert}.{leaf}" for leaf in self.leaves]


def fused_layer(module: str) -> FusedLayer | None:
    """What a module with a 3-D weight holds of its experts; None where its name does not tell."""
    parent, _, leaf = module.removesuffix(".weight").rpartition(".")
    if leaf in _PARAMETERS:
        return FusedLayer(parent, _PARAMETERS[leaf])
    if leaf in _MODULES and parent.endswith(".experts"):
        return FusedLayer(parent, _MODULES[leaf])
    if leaf in _BESIDE and parent.endswith("moe"):
        return FusedLayer(f"{parent}.experts", _BESIDE[leaf])
    return None


def fused_holders(layer: str) -> Iterator[tuple[str, int, int]]:
    """For `x.experts.7.up_proj`: modules that may hold it with all others, and which of how many
    equal parts of their rows it is; Mixtral's w1, w3 and w2 are gate, up and down."""
    block, _, rest = layer.rpartition(".experts.")
    number, _, leaf = rest.partition(".")
    if not block or not number.isdigit():
        return
    leaf = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
    inside = (_PARAMETERS | _MODULES).items()
    for module, leaves in [
        *((f"{block}.experts.{name}", leaves) for name, leaves in inside),
        *((f"{block}.{name}", leaves) for name, leaves in _BESIDE.items()),
    ]:
        if leaf in leaves:
            yield module, leaves.index(leaf), len(leaves)


def expert_block(module: str) -> str | None:
    """`x.experts.7.up_proj` and `x.experts.up_proj` → `x.experts`; None for other modules.

    Granite's `x_moe.input_linear` and `.output_linear` are `x_moe.experts` in the engines.
    """
    head, found, _ = module.rpartition(".experts.")
    parent, _, leaf = module.rpartition(".")
    if not found and leaf in _BESIDE and parent.endswith("moe"):
        return f"{parent}.experts"
    return f"{head}.experts" if found else None
