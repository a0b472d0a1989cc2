"""Lists of modules that every engine understands: the names it gives them, beside the file's.

An ignore list names modules of the checkpoint. An engine looks in it for its own names: of the
layer that it merged q, k and v into, or below the prefix of its own class. A list with all of them
means the same to every reader; one that does not know a name skips it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from quantkit.checkpoint.network.config import expert_count
from quantkit.checkpoint.network.fused_experts import expert_block
from quantkit.engines.names import renamed
from quantkit.engines.rules import EngineFamily, engines

_GATED = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")


def merged_aliases(names: Collection[str]) -> list[str]:
    """The names of merged layers, of any engine, all of whose members are among `names`."""
    present = set(names)
    found: dict[str, None] = {}
    for name in names:
        parent, dot, leaf = name.rpartition(".")
        for fused, members in _merges().get(leaf, ()):
            if all(f"{parent}{dot}{member}" in present for member in members):
                found[f"{parent}{dot}{fused}"] = None
    return list(found)


def expanded(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """`names` and then what the engines call these modules, each once.

    Patterns (`re:`, globs) are passed on as they are. `config` is config.json.
    """
    given = list(names)
    plain = [n for n in given if not n.startswith("re:") and not any(c in n for c in "*?[")]
    families = [engine.family(config) for engine in engines().values()]
    blocks = [*_whole_blocks(plain, expert_count(config)), *_fused_experts(plain)]
    blocks += [
        _named(f"{block}.0.{leaf}", family)
        for family in families
        for block in blocks
        if _complete(block, given, family)
        for leaf in family.experts
    ]
    merged = merged_aliases([*plain, *blocks])  # a list that is expanded again stays as it is
    found = dict.fromkeys([*given, *merged, *blocks])
    for family in families:
        if family.rename or family.maps:
            found |= dict.fromkeys(_named(name, family) for name in (*plain, *merged))
    return list(found)


def aliases_of(names: Collection[str], config: Mapping[str, Any]) -> set[str]:
    """Every other name that an engine gives to these modules (for those who read lists)."""
    return set(expanded(names, config)) - set(names)


@cache
def _merges() -> dict[str, tuple[tuple[str, tuple[str, ...]], ...]]:
    """Last name part of a first member → the merged layers that begin with it."""
    found: dict[str, dict[tuple[str, tuple[str, ...]], None]] = {}
    for engine in engines().values():
        for family in (*engine.families, engine.otherwise):
            for fused, members in family.merges.items():
                found.setdefault(members[0], {})[fused, members] = None
    return {leaf: tuple(merges) for leaf, merges in found.items()}


def _named(name: str, family: EngineFamily) -> str:
    """The entry that an engine, having renamed it its way, finds for its layer of that module.

    Where none leads there, the name without its first part: some engines compare endings.
    """
    wanted = renamed(name, family.rename)
    if renamed(name, family.maps) == wanted:
        return name
    return wanted if renamed(wanted, family.maps) == wanted else wanted.partition(".")[2] or wanted


def _complete(block: str, names: Collection[str], family: EngineFamily) -> bool:
    """Whether every layer of the block's experts is listed: the tensors of all, or those of one."""
    if not any(name.startswith(f"{block}.0.") for name in names):
        return True
    leaves = {name.rpartition(".")[2] for name in names if name.startswith(f"{block}.0.")}
    ungated = [] if "gate_proj" in family.reads or "w1" in family.reads else [family.reads]
    return any(leaves.issuperset(way) for way in (_GATED, _MIXTRAL, *ungated))


def _fused_experts(names: Iterable[str]) -> list[str]:
    """For experts stored in one tensor: the name of their block."""
    first = (".gate_up_proj", ".input_linear", ".fc1")
    blocks = {expert_block(name) for name in names if name.endswith(first)} - {None}
    return sorted(map(str, blocks))


def _whole_blocks(names: Iterable[str], count: int) -> list[str]:
    """The blocks of which all `count` experts are named, each with the same layers: some readers
    know the block alone."""
    named: dict[str, dict[str, set[str]]] = {}
    for name in names:
        block, found, rest = name.rpartition(".experts.")
        number, dot, leaf = rest.partition(".")
        if found and dot and number.isdigit():
            named.setdefault(f"{block}.experts", {}).setdefault(leaf, set()).add(number)
    whole = {str(number) for number in range(count)}
    return [block for block, leaves in named.items() if all(n >= whole for n in leaves.values())]
