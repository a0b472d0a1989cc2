"""What an engine takes each of its layers for, by the settings alone: the replay of its matching.

Engines build a model before they see a tensor. Whether a layer is quantized, and how, they decide
by comparing *their* name of it with the lists of the settings, every engine and layout by rules of
its own. One reader here replays one such rule; `data/*.yaml` says which engine uses which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from quantkit.engines.candidate import Candidate
from quantkit.engines.data import Engine, Family
from quantkit.engines.names import Layer, renamed


@dataclass(frozen=True)
class Belief:
    """`settings` is what tells one kind of quantization from another in the layout (None where it
    has one kind only). `mixed` are the members that differ when the engine stops at them; `entry`
    the entry that made a layer 16 bit."""

    quantized: bool
    settings: object = None
    mixed: bool = False
    entry: str | None = None


Reader = Callable[[Layer], Belief]

_NOT = Belief(quantized=False)
_YES = Belief(quantized=True)
_MIXED = Belief(quantized=False, mixed=True)


def reader(engine: Engine, family: Family, candidate: Candidate) -> Reader | None:
    """The rule by which `engine` reads this candidate's settings; None for a layout it does not
    know. Layers that a family builds in 16 bit whatever the settings say are not asked for."""
    rule = engine.match.get(candidate.layout)
    return None if rule is None else _READERS[rule](family, candidate)


def members(layer: Layer, family: Family) -> tuple[str, ...]:
    """The engine's names of what it knows a layer to be merged from, else its own name."""
    told = family.told.get(layer.leaf)
    if told is None or len(layer.parts) == 1:
        return (layer.name,)
    parent = layer.name[: -len(layer.leaf)]
    return tuple(f"{parent}{leaf}" for leaf in told)


class Entries:
    """A list of exact names and `re:` patterns; `suffix` lets a name match from any dot on."""

    def __init__(self, entries: Iterable[str], suffix: bool = False) -> None:
        found = list(entries)
        self.exact = {e for e in found if not e.startswith("re:")}
        self.patterns = {e: re.compile(e[3:]) for e in found if e.startswith("re:")}
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


def _each(names: Sequence[str], match: Callable[[str], str | None]) -> Belief:
    """16 bit when all members match, quantized when none does."""
    found = [match(name) for name in names]
    if all(entry is None for entry in found):
        return _YES
    return _MIXED if None in found else Belief(quantized=False, entry=found[0])


def _compressed_tensors(family: Family, candidate: Candidate, *, suffix: bool) -> Reader:
    ignore = Entries(_mapped(candidate.settings.get("ignore") or (), family), suffix)
    groups: dict[str, str] = {}
    for name, group in (candidate.settings.get("config_groups") or {}).items():
        if group.get("weights") is not None:
            for entry in group.get("targets") or ():
                groups.setdefault(_mapped_name(entry, family), name)
    named = Entries(groups)
    by_class = groups.get("Linear")

    def target(layer: Layer) -> Belief:
        direct = named.match(layer.name)
        if direct is not None:
            return Belief(True, groups[direct])
        if suffix and by_class is not None and not layer.head:
            return Belief(True, by_class)
        found = [named.match(name) for name in members(layer, family)]
        if len(layer.parts) > 1 and None not in found:
            return Belief(True, groups[str(found[0])])
        return Belief(True, by_class) if by_class is not None and not layer.head else _NOT

    def read(layer: Layer) -> Belief:
        if layer.experts:
            kinds = [_expert(name, ignore, named, groups) for name in _expert_names(layer)]
            return kinds[0] if len(set(kinds)) == 1 else _MIXED
        direct = ignore.match(layer.name)
        if direct is not None:
            return Belief(quantized=False, entry=direct)
        ignored = _each(members(layer, family), ignore.match)
        return target(layer) if ignored == _YES else ignored

    return read


def _expert_names(layer: Layer) -> list[str]:
    """The names by which compressed-tensors configurations are asked about a block of experts."""
    leaves = dict.fromkeys(part.name.rpartition(".")[2] for part in layer.parts)
    if "gate_up_proj" in leaves:
        leaves = dict.fromkeys(("gate_proj", "up_proj", "down_proj"))
    return [f"{layer.name}.0.{leaf}" for leaf in leaves]


def _expert(name: str, ignore: Entries, named: Entries, groups: Mapping[str, str]) -> Belief:
    entry = ignore.match(name)
    if entry is not None:
        return Belief(quantized=False, entry=entry)
    target = named.match(name) or ("Linear" if "Linear" in groups else None)
    return _NOT if target is None else Belief(True, groups[target])


def _modelopt(family: Family, candidate: Candidate, *, substring: bool) -> Reader:
    listed = _modelopt_list(candidate.settings)
    if substring:  # vLLM splits "x*" in two before it renames
        halves = ((e[:-1], f"{e[:-1]}.*") if _whole_tree(e) else (e,) for e in listed)
        listed = [half for pair in halves for half in pair]
    entries = list(dict.fromkeys(_mapped(listed, family)))
    plain = {e for e in entries if "*" not in e}
    globs = [(e, re.compile(translate(e))) for e in entries]
    layers = _modelopt_layers(family, candidate.settings)

    def path(name: str) -> str | None:
        return next((run for run in _runs(name) if run in plain), None)

    def anywhere(name: str) -> str | None:
        short = name.removeprefix("language_model.")
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

    def read(layer: Layer) -> Belief:
        shards = members(layer, family)
        if not substring and layer.leaf in _ALWAYS_SPLIT and len(layer.parts) > 1:
            parent = layer.name[: -len(layer.leaf)]
            shards = tuple(f"{parent}{leaf}" for leaf in _ALWAYS_SPLIT[layer.leaf])
        if layer.experts:  # vLLM: one excluded expert excludes them all
            held = next((e for e in entries if "experts" in e and layer.name in e), None)
            belief = Belief(quantized=False, entry=held) if held and substring else _YES
        else:
            belief = _each(shards, exact if substring else path)
        if belief != _YES:
            return belief
        entry = anywhere(layer.name)
        if entry is not None:
            return Belief(quantized=False, entry=entry)
        if substring and any(part in layer.name for part in ("vision_tower", "vision_model")):
            return _NOT
        return layers(layer) if layers else _YES

    return read


_ALWAYS_SPLIT = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
}  # fmt: skip
"""What SGLang takes apart in ModelOpt's lists even where a family is not told of its merges."""


def _whole_tree(entry: str) -> bool:
    return len(entry) > 1 and entry.endswith("*") and entry[-2] != "."


def _modelopt_list(settings: Mapping[str, Any]) -> list[str]:
    section = settings.get("quantization") or settings
    return list(section.get("exclude_modules") or section.get("ignore") or ())


def _modelopt_layers(family: Family, settings: Mapping[str, Any]) -> Reader | None:
    """The per-layer algorithms of a MIXED_PRECISION checkpoint."""
    section = settings.get("quantization") or settings
    listed = section.get("quantized_layers")
    if not listed:
        return None
    algorithm = {
        _mapped_name(name, family): str(entry.get("quant_algo", "")).upper()
        for name, entry in listed.items()
    }
    parents: dict[str, str] = {}
    for name, kind in algorithm.items():
        for end in range(name.count("."), 0, -1):
            parents.setdefault(".".join(name.split(".")[:end]), kind)

    def read(layer: Layer) -> Belief:
        if layer.name in algorithm:
            return Belief(True, algorithm[layer.name])
        found = {algorithm[n] for n in members(layer, family) if n in algorithm}
        if len(found) > 1:
            return _MIXED
        kind = found.pop() if found else parents.get(layer.name)
        return _NOT if kind is None else Belief(True, kind)

    return read


def _gptq(candidate: Candidate, *, stored: bool) -> Reader:
    rules = [
        (rule, re.compile(rule.removeprefix("+:").removeprefix("-:")), changes)
        for rule, changes in (candidate.settings.get("dynamic") or {}).items()
    ]
    head = bool(candidate.settings.get("lm_head"))

    def read(layer: Layer) -> Belief:
        if layer.head and not head:
            return _NOT
        if stored and not layer.experts:  # vLLM reads which tensors are packed
            kinds = {part.scheme is not None for part in layer.parts}
            if len(kinds) > 1:
                return _MIXED
            if not kinds.pop():
                return _NOT
        for rule, pattern, changes in rules:
            if pattern.match(layer.name):
                if rule.startswith("-:"):
                    return Belief(quantized=False, entry=rule)
                return Belief(True, _gptq_settings(candidate.settings, changes))
        return Belief(True, _gptq_settings(candidate.settings, {}))

    return read


def _gptq_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple({**base, **changes}.get(key) for key in ("bits", "group_size", "sym"))


def _awq(family: Family, candidate: Candidate, *, whole: bool) -> Reader:
    entries = _mapped(candidate.settings.get("modules_to_not_convert") or (), family)
    head = bool(candidate.settings.get("lm_head"))

    def match(name: str) -> str | None:
        return next((entry for entry in entries if entry in name), None)

    def read(layer: Layer) -> Belief:
        if layer.head and not head:
            return _NOT
        if not entries and not whole:  # vLLM then reads which tensors are packed
            kinds = {part.scheme is not None for part in layer.parts}
            return _MIXED if len(kinds) > 1 else Belief(kinds.pop())
        direct = match(layer.name)
        if direct is not None:
            return Belief(quantized=False, entry=direct)
        return _YES if whole else _each(members(layer, family), match)

    return read


def _auto_round(family: Family, candidate: Candidate) -> Reader:
    settings = candidate.settings
    extra = {
        _mapped_name(name, family): entry
        for name, entry in (settings.get("extra_config") or {}).items()
    }
    patterns = [(n, re.compile(n)) for n in extra if any(c in n for c in "*+?^$()[]{}|\\")]
    blocks = settings.get("block_name_to_quantize") or settings.get("to_quant_block_names") or ()
    starts = _mapped(blocks.split(",") if isinstance(blocks, str) else _flat(blocks), family)

    def of(name: str, quantized: bool) -> Belief:
        entry = name if name in extra else None
        if entry is None:
            entry = next((n for n, pattern in patterns if pattern.search(name)), None)
        changes = extra[entry] if entry is not None else {}
        bits = int(changes.get("bits", settings.get("bits", 4) if quantized else 16))
        if bits >= 16:
            return Belief(quantized=False, entry=entry)
        return Belief(True, (bits, *_gptq_settings(settings, changes)[1:]))

    def read(layer: Layer) -> Belief:
        if layer.name in extra:
            return of(layer.name, True)
        inside = not layer.head and (not starts or layer.name.startswith(tuple(starts)))
        if layer.experts:
            found = {of(name, inside) for name in extra if name.startswith(layer.name)}
            return _MIXED if len(found) > 1 else next(iter(found), of(layer.name, inside))
        found = {of(name, inside) for name in members(layer, family)}
        settled = {(b.quantized, b.settings) for b in found}
        return _MIXED if len(settled) > 1 else next(iter(found))

    return read


def _ascend(candidate: Candidate) -> Reader:
    types = candidate.settings
    every = {**_ALWAYS_SPLIT, "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa")}

    def kind(name: str) -> str:
        short = name.removeprefix("language_model.")
        found = types.get(f"{name}.weight", types.get(f"{short}.weight"))
        return str(found or types.get(f"language_model.{name}.weight", ""))

    def read(layer: Layer) -> Belief:
        if layer.head:
            return _NOT
        names: tuple[str, ...] = (layer.name,)
        if layer.experts:
            names = tuple(_expert_names(layer))
        elif layer.leaf in every and len(layer.parts) > 1:
            parent = layer.name[: -len(layer.leaf)]
            names = tuple(f"{parent}{leaf}" for leaf in every[layer.leaf])
        kinds = {kind(name) for name in names}
        if len(kinds) > 1:
            return _MIXED
        only = kinds.pop()
        return _NOT if only in ("", "FLOAT") else Belief(True, only)

    return read


def _mapped(entries: Iterable[str], family: Family) -> list[str]:
    return [_mapped_name(entry, family) for entry in entries]


def _mapped_name(entry: str, family: Family) -> str:
    """A path as the engine renames it; patterns and class names stay as they are."""
    return entry if entry.startswith("re:") or "." not in entry else renamed(entry, family.maps)


def _runs(name: str) -> Iterable[str]:
    """Every run of whole name parts."""
    parts = name.split(".")
    ends = range(len(parts), 0, -1)
    return (".".join(parts[start:end]) for end in ends for start in range(end))


def _flat(listed: Any) -> list[str]:
    if isinstance(listed, str):
        return [listed]
    return [name for entry in listed for name in _flat(entry)]


_READERS: dict[str, Callable[[Family, Candidate], Reader]] = {
    "exact_or_regex": lambda f, c: _compressed_tensors(f, c, suffix=False),
    "suffix_or_regex": lambda f, c: _compressed_tensors(f, c, suffix=True),
    "path_or_glob_or_substring": lambda f, c: _modelopt(f, c, substring=True),
    "path_or_glob": lambda f, c: _modelopt(f, c, substring=False),
    "stored": lambda _, c: _gptq(c, stored=True),
    "dynamic": lambda _, c: _gptq(c, stored=False),
    "substring": lambda f, c: _awq(f, c, whole=False),
    "whole_substring": lambda f, c: _awq(f, c, whole=True),
    "extra_config": _auto_round,
    "description": lambda _, c: _ascend(c),
}
