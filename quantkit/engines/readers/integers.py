"""GPTQ's `dynamic`, AWQ's `modules_to_not_convert`, AutoRound's `extra_config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

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
    mapped,
    mapped_name,
    members,
)
from quantkit.engines.rules import EngineFamily


def gptq(family: EngineFamily, candidate: Loadable, *, stored: bool) -> SettingsReader:
    """`dynamic` rules on the engine's name of a layer, the first match first.

    `stored` is vLLM's way: which layers are quantized it reads from the tensors, and of a layer
    that it knows as merged it looks for the members, also where the file holds it as one.
    """
    rules = [
        (rule, compiled(rule.removeprefix("+:").removeprefix("-:"), rule), changes)
        for rule, changes in (candidate.settings.get("dynamic") or {}).items()
    ]
    head = bool(candidate.settings.get("lm_head"))

    def read(layer: EngineLayer) -> Reading:
        if layer.head and not head:
            return NOT
        if stored and not layer.experts:  # vLLM reads which tensors are packed
            kinds = {part.scheme is not None for part in layer.parts}
            if len(kinds) > 1:
                return MIXED
            if not kinds.pop():
                return NOT
            if len(layer.parts) == 1 and layer.leaf in family.told:
                wanted = ", ".join(family.told[layer.leaf])
                return replace(NOT, because=f"it looks for {wanted}, which the file holds as one")
        for rule, pattern, changes in rules:
            if pattern.match(layer.name):
                if rule.startswith("-:"):
                    return Reading(quantized=False, entry=rule)
                return Reading(True, _gptq_settings(candidate.settings, changes))
        return Reading(True, _gptq_settings(candidate.settings, {}))

    return read


def _gptq_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple({**base, **changes}.get(key) for key in ("bits", "group_size", "sym"))


def awq(family: EngineFamily, candidate: Loadable, *, whole: bool) -> SettingsReader:
    """Entries match anywhere in a name; `whole` (SGLang) does not take merged layers apart."""
    entries = mapped(candidate.settings.get("modules_to_not_convert") or (), family)
    head = bool(candidate.settings.get("lm_head"))

    def match(name: str) -> str | None:
        return next((entry for entry in entries if entry in name), None)

    def read(layer: EngineLayer) -> Reading:
        if layer.head and not head:
            return NOT
        if not entries and not whole:  # vLLM then reads which tensors are packed
            kinds = {part.scheme is not None for part in layer.parts}
            return MIXED if len(kinds) > 1 else Reading(kinds.pop())
        direct = match(layer.name)
        if direct is not None:
            return Reading(quantized=False, entry=direct)
        return YES if whole else each(members(layer, family), match)

    return read


def auto_round(family: EngineFamily, candidate: Loadable) -> SettingsReader:
    """Entries by name or regular expression over the settings of the blocks."""
    settings = candidate.settings
    extra = {
        mapped_name(name, family): entry
        for name, entry in (settings.get("extra_config") or {}).items()
    }
    patterns = [(n, compiled(n, n)) for n in extra if any(c in n for c in "*+?^$()[]{}|\\")]
    blocks = settings.get("block_name_to_quantize") or settings.get("to_quant_block_names") or ()
    starts = mapped(blocks.split(",") if isinstance(blocks, str) else _flat(blocks), family)

    def of(name: str, quantized: bool) -> Reading:
        entry = name if name in extra else None
        if entry is None:
            entry = next((n for n, pattern in patterns if pattern.search(name)), None)
        changes = extra[entry] if entry is not None else {}
        bits = int(changes.get("bits", settings.get("bits", 4) if quantized else 16))
        if bits >= 16:
            return Reading(quantized=False, entry=entry)
        return Reading(True, (bits, *_gptq_settings(settings, changes)[1:]))

    def read(layer: EngineLayer) -> Reading:
        if layer.name in extra:
            return of(layer.name, True)
        inside = not layer.head and (not starts or layer.name.startswith(tuple(starts)))
        if layer.experts:
            found = [of(name, inside) for name in extra if name.startswith(layer.name)]
            return _agreed(found or [of(layer.name, inside)])
        return _agreed([of(name, inside) for name in members(layer, family)])

    return read


def _agreed(found: Sequence[Reading]) -> Reading:
    """What all say; the entries by which they say it may differ."""
    return found[0] if len({(b.quantized, b.settings) for b in found}) == 1 else MIXED


def _flat(listed: Any) -> list[str]:
    if isinstance(listed, str):
        return [listed]
    return [name for entry in listed for name in _flat(entry)]
