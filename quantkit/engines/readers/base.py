"""What an engine takes a layer for, and what the readers of settings have in common.

Engines build a model before they see a tensor. Whether a layer is quantized, and how, they decide
by comparing *their* name of it with the lists of the settings, every engine and layout by rules of
its own. `readers/` replays these rules, `versions/*.yaml` says which engine uses which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from quantkit.engines.names import EngineLayer, renamed
from quantkit.engines.rules import EngineFamily


@dataclass(frozen=True)
class Reading:
    """`settings` is what tells one kind of quantization from another in the layout (None where it
    has one kind only). `mixed` are the members that differ when the engine stops at them; `entry`
    the entry that made a layer 16 bit, `because` what did where that is no entry."""

    quantized: bool
    settings: object = None
    mixed: bool = False
    entry: str | None = None
    because: str = ""


SettingsReader = Callable[[EngineLayer], Reading]

NOT = Reading(quantized=False)
YES = Reading(quantized=True)
MIXED = Reading(quantized=False, mixed=True)

ALWAYS_SPLIT = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
}  # fmt: skip
"""What some readers take apart even where a family is not told of its merges."""


def members(layer: EngineLayer, family: EngineFamily) -> tuple[str, ...]:
    """The engine's names of what it knows a layer to be merged from, else its own name."""
    told = family.told.get(layer.leaf)
    if told is None or len(layer.parts) == 1:
        return (layer.name,)
    parent = layer.name[: -len(layer.leaf)]
    return tuple(f"{parent}{leaf}" for leaf in told)


def expert_names(layer: EngineLayer, family: EngineFamily) -> list[str]:
    """The names by which compressed-tensors configurations are asked about a block of experts."""
    return [f"{layer.name}.0.{leaf}" for leaf in family.experts]


def each(names: Sequence[str], match: Callable[[str], str | None]) -> Reading:
    """16 bit when all members match, quantized when none does."""
    found = [match(name) for name in names]
    if all(entry is None for entry in found):
        return YES
    return MIXED if None in found else Reading(quantized=False, entry=found[0])


def mapped(entries: Iterable[str], family: EngineFamily) -> list[str]:
    """A list as the engine renames its entries."""
    return [mapped_name(entry, family) for entry in entries]


def mapped_name(entry: str, family: EngineFamily) -> str:
    """A path as the engine renames it; patterns and class names stay as they are."""
    return entry if entry.startswith("re:") or "." not in entry else renamed(entry, family.maps)
