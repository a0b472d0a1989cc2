"""compressed-tensors: `ignore`, and the targets of `config_groups`.

vLLM compares whole names, SGLang also endings; both take `re:` entries as regular expressions from
the start of the name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantkit.checkpoint.network.patterns import compiled
from quantkit.engines.loadable import Loadable
from quantkit.engines.names import EngineLayer
from quantkit.engines.readers.base import (
    MIXED,
    NOT,
    YES,
    Reading,
    SettingsReader,
    each,
    expert_names,
    mapped,
    mapped_name,
    members,
)
from quantkit.engines.rules import EngineFamily


class Entries:
    """A list of exact names and `re:` patterns; `suffix` lets a name match from any dot on."""

    def __init__(self, entries: Iterable[str], suffix: bool = False) -> None:
        found = list(entries)
        self.exact = {e for e in found if not e.startswith("re:")}
        self.patterns = {e: compiled(e[3:], e) for e in found if e.startswith("re:")}
        self.suffix = suffix

    def match(self, name: str) -> str | None:
        """The entry that names `name`, or None."""
        if name in self.exact:
            return name
        if self.suffix:
            parts = name.split(".")
            ends = (".".join(parts[start:]) for start in range(1, len(parts)))
            ending = next((end for end in ends if end in self.exact), None)
            if ending is not None:
                return ending
        return next((e for e, pattern in self.patterns.items() if pattern.match(name)), None)


def compressed_tensors(
    family: EngineFamily, candidate: Loadable, *, suffix: bool
) -> SettingsReader:
    """The ignore list first, then the targets: by name, by class "Linear", by merged members.

    `suffix` is SGLang's way: a name also matches from any dot on, and the class comes before the
    members of a merged layer.
    """
    ignore = Entries(mapped(candidate.settings.get("ignore") or (), family), suffix)
    groups: dict[str, str] = {}
    for name, group in (candidate.settings.get("config_groups") or {}).items():
        if group.get("weights") is not None:
            for entry in group.get("targets") or ():
                groups.setdefault(mapped_name(entry, family), name)
    named = Entries(groups)
    by_class = groups.get("Linear")

    def target(layer: EngineLayer) -> Reading:
        direct = named.match(layer.name)
        if direct is not None:
            return Reading(True, groups[direct])
        if suffix and by_class is not None and not layer.head:
            return Reading(True, by_class)
        found = [named.match(name) for name in members(layer, family)]
        if len(layer.parts) > 1 and None not in found:
            return Reading(True, groups[str(found[0])])
        return Reading(True, by_class) if by_class is not None and not layer.head else NOT

    def read(layer: EngineLayer) -> Reading:
        if layer.experts:
            kinds = [_expert(name, ignore, named, groups) for name in expert_names(layer, family)]
            # Each expert may be named by an entry of its own.
            agreed = len({(kind.quantized, kind.settings) for kind in kinds}) == 1
            return kinds[0] if agreed else MIXED
        direct = ignore.match(layer.name)
        if direct is not None:
            return Reading(quantized=False, entry=direct)
        ignored = each(members(layer, family), ignore.match)
        return target(layer) if ignored == YES else ignored

    return read


def _expert(name: str, ignore: Entries, named: Entries, groups: Mapping[str, str]) -> Reading:
    entry = ignore.match(name)
    if entry is not None:
        return Reading(quantized=False, entry=entry)
    target = named.match(name) or ("Linear" if "Linear" in groups else None)
    return NOT if target is None else Reading(True, groups[target])
