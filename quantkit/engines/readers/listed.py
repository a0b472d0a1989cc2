"""`modules_to_not_convert` of FP8, GPT-OSS's experts, and Quark's `exclude`.

vLLM compares an FP8 entry with whole names, SGLang with a run of name parts; both find an entry of
experts by the block's name in it. Quark's are exact names, `re:` patterns, or globs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from typing import Any

from quantkit.checkpoint.network.patterns import compiled
from quantkit.engines.loadable import Loadable
from quantkit.engines.names import EngineLayer
from quantkit.engines.readers.base import (
    ALWAYS_SPLIT,
    NOT,
    YES,
    Reading,
    SettingsReader,
    each,
    mapped,
    members,
)
from quantkit.engines.rules import EngineFamily


def fp8(family: EngineFamily, candidate: Loadable, *, path: bool) -> SettingsReader:
    """`path` is SGLang's way: a run of name parts, with and without "model." before it."""
    settings = candidate.settings
    keys = ("ignored_layers", "modules_to_not_convert")
    entries = next((settings[key] for key in keys if settings.get(key)), ())
    listed = mapped(entries, family)
    if path:
        short = [entry.removeprefix("model.") for entry in listed]
        listed = list(dict.fromkeys([*short, *(f"model.{entry}" for entry in short)]))

    def match(name: str) -> str | None:
        if not path:
            return name if name in listed else None
        return next((e for e in listed if f".{e}." in f".{name}."), None)

    def read(layer: EngineLayer) -> Reading:
        if layer.head:
            return NOT
        shards = members(layer, family)
        if path and layer.leaf in ALWAYS_SPLIT and len(layer.parts) > 1:
            parent = layer.name[: -len(layer.leaf)]
            shards = tuple(f"{parent}{leaf}" for leaf in ALWAYS_SPLIT[layer.leaf])
        if layer.experts:
            held = next((e for e in listed if "experts" in e and layer.name in e), None)
            held = held or (match(layer.name) if path else None)
            return Reading(quantized=False, entry=held) if held else YES
        direct = match(layer.name) if len(shards) > 1 else None
        return Reading(quantized=False, entry=direct) if direct else each(shards, match)

    return read


def mxfp4(_: EngineFamily, __: Loadable) -> SettingsReader:
    """Experts are quantized, all other layers are 16 bit whatever the settings say."""
    return lambda layer: YES if layer.experts else NOT


def quark(family: EngineFamily, candidate: Loadable) -> SettingsReader:
    """`exclude` first; of the others each has the settings of its entry, or the global ones."""
    settings = candidate.settings
    match = _matcher(mapped(settings.get("exclude") or (), family))
    by_layer = settings.get("layer_quant_config") or {}
    chosen = _matcher(by_layer)

    def of(name: str) -> str:
        entry = chosen(name)
        found: Any = settings.get("global_quant_config") if entry is None else by_layer[entry]
        return repr({k: (found or {}).get(k) for k in ("weight", "input_tensors")})

    def read(layer: EngineLayer) -> Reading:
        if layer.head:
            return NOT
        if layer.experts:
            inside = [part.name for part in layer.parts]
            held = match(layer.name) or next(filter(None, map(match, inside)), None)
            return Reading(quantized=False, entry=held) if held else Reading(True, of(inside[0]))
        direct = match(layer.name)
        found = (
            Reading(quantized=False, entry=direct)
            if direct
            else each(members(layer, family), match)
        )
        return Reading(True, of(members(layer, family)[0])) if found == YES else found

    return read


def _matcher(entries: Iterable[str]) -> Callable[[str], str | None]:
    patterns = {
        entry: compiled(entry[3:], entry)
        if entry.startswith("re:")
        else re.compile(translate(entry))
        for entry in entries
    }
    return lambda name: next((e for e, pattern in patterns.items() if pattern.match(name)), None)
