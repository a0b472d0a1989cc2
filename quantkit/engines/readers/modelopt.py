"""ModelOpt: `exclude_modules` (or `ignore`) of names and globs, and `quantized_layers`.

vLLM also takes an entry for a substring of the name; SGLang compares each part of the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from typing import Any

from quantkit.engines.loadable import Loadable
from quantkit.engines.names import EngineLayer
from quantkit.engines.readers.base import (
    ALWAYS_SPLIT,
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


def modelopt(family: EngineFamily, candidate: Loadable, *, substring: bool) -> SettingsReader:
    """Members of merged layers by name, then the whole name by globs; `substring` is vLLM's way."""
    listed = _modelopt_list(candidate.settings)
    if substring:  # vLLM splits "x*" in two before it renames
        halves = ((e[:-1], f"{e[:-1]}.*") if _whole_tree(e) else (e,) for e in listed)
        listed = [half for pair in halves for half in pair]
    entries = list(dict.fromkeys(mapped(listed, family)))
    plain = {e for e in entries if "*" not in e}
    globs = [(e, re.compile(translate(e))) for e in entries]
    layers = _modelopt_layers(family, candidate.settings)

    def path(name: str) -> str | None:
        return next((run for run in _runs(name) if run in plain), None)

    def anywhere(name: str) -> str | None:
        short = name.removeprefix("language_model.")
        if not substring and not plain.isdisjoint((name, short)):
            return name if name in plain else short
        for entry, pattern in globs:
            if substring and (entry in name or entry in short):
                return entry
            if pattern.match(name) or pattern.match(short):
                return entry
            if not substring and any(pattern.match(part) for part in name.split(".")):
                return entry
        return None

    def exact(name: str) -> str | None:
        return name if name in plain else None

    def read(layer: EngineLayer) -> Reading:
        shards = members(layer, family)
        if not substring and layer.leaf in ALWAYS_SPLIT and len(layer.parts) > 1:
            parent = layer.name[: -len(layer.leaf)]
            shards = tuple(f"{parent}{leaf}" for leaf in ALWAYS_SPLIT[layer.leaf])
        if layer.experts:  # vLLM: one excluded expert excludes them all
            held = next((e for e in entries if "experts" in e and layer.name in e), None)
            belief = Reading(quantized=False, entry=held) if held and substring else YES
        else:
            belief = each(shards, exact if substring else path)
        if belief != YES:
            return belief
        entry = anywhere(layer.name)
        if entry is not None:
            return Reading(quantized=False, entry=entry)
        if substring and any(part in layer.name for part in ("vision_tower", "vision_model")):
            return NOT
        return layers(layer) if layers else YES

    return read


def _whole_tree(entry: str) -> bool:
    return len(entry) > 1 and entry.endswith("*") and entry[-2] != "."


def _modelopt_list(settings: Mapping[str, Any]) -> list[str]:
    section = settings.get("quantization") or settings
    return list(section.get("exclude_modules") or section.get("ignore") or ())


def _modelopt_layers(family: EngineFamily, settings: Mapping[str, Any]) -> SettingsReader | None:
    """The per-layer algorithms of a MIXED_PRECISION checkpoint."""
    section = settings.get("quantization") or settings
    listed = section.get("quantized_layers")
    if not listed:
        return None
    algorithm = {
        mapped_name(name, family): str(entry.get("quant_algo", "")).upper()
        for name, entry in listed.items()
    }
    parents: dict[str, str] = {}
    for name, kind in algorithm.items():
        for end in range(name.count("."), 0, -1):
            parents.setdefault(".".join(name.split(".")[:end]), kind)

    def read(layer: EngineLayer) -> Reading:
        if layer.name in algorithm:
            return Reading(True, algorithm[layer.name])
        found = {algorithm[n] for n in members(layer, family) if n in algorithm}
        if len(found) > 1:
            return MIXED
        kind = found.pop() if found else parents.get(layer.name)
        return NOT if kind is None else Reading(True, kind)

    return read


def _runs(name: str) -> Iterable[str]:
    """Every run of whole name parts."""
    parts = name.split(".")
    ends = range(len(parts), 0, -1)
    return (".".join(parts[start:end]) for end in ends for start in range(end))
