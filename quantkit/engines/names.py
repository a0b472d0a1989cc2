"""From the names of a checkpoint to the layers that an engine builds of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from quantkit.checkpoint.network.fused_experts import expert_block
from quantkit.checkpoint.network.modules import layer_index
from quantkit.engines.loadable import LayerPart
from quantkit.engines.rules import EngineFamily, EngineRules, Merges, Renaming

Split = Literal["rows", "columns", "whole"]


@dataclass(frozen=True)
class EngineLayer:
    """One layer of the engine.

    `parts` are its modules in the checkpoint, in the order they are stacked; all experts of a block
    are one layer. `split`: which dimension tensor parallelism divides ("rows": the input's).
    """

    name: str
    parts: tuple[LayerPart, ...]
    split: Split
    experts: bool = False

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def head(self) -> bool:
        return self.parts[0].kind == "head"


def renamed(name: str, rules: Renaming) -> str:
    """The name after every rule that fits, in order.

    A rule whose first part begins with a dot or does not end with one replaces that text wherever
    it stands (once); the others replace a prefix.
    """
    for old, new in rules:
        if old.startswith(".") or not old.endswith("."):
            if new not in name:
                name = name.replace(old, new, 1)
        elif name.startswith(old):
            name = new + name[len(old) :]
    return name


def layers(
    engine: EngineRules, family: EngineFamily, parts: Iterable[LayerPart]
) -> list[EngineLayer]:
    """The layers an engine makes of these modules, without embeddings and draft (MTP) layers."""
    single: dict[str, LayerPart] = {}
    experts: dict[str, list[LayerPart]] = {}
    for part in parts:
        if part.kind in ("embedding", "mtp"):
            continue
        block = _expert_block(part)
        if block:
            experts.setdefault(block, []).append(part)
        else:
            single[part.name] = part
    return [
        *_dense(engine, family, single),
        *(
            EngineLayer(renamed(block, family.rename), tuple(members), "columns", experts=True)
            for block, members in experts.items()
        ),
    ]


def merged_names(names: Iterable[str], merges: Merges) -> dict[str, tuple[str, ...]]:
    """Full name of each merged layer → its members, where all of these are among `names`."""
    listed = list(names)
    present = set(listed)
    first = {members[0]: (fused, members) for fused, members in merges.items()}
    found = {}
    for name in listed:
        parent, dot, leaf = name.rpartition(".")
        fused, members = first.get(leaf, ("", ()))
        full = tuple(f"{parent}{dot}{member}" for member in members)
        if full and present.issuperset(full):
            found[f"{parent}{dot}{fused}"] = full
    return found


def _dense(
    engine: EngineRules, family: EngineFamily, single: Mapping[str, LayerPart]
) -> Iterable[EngineLayer]:
    merged = merged_names((n for n, p in single.items() if p.kind != "head"), family.merges)
    inside = {member for members in merged.values() for member in members}
    for name, members in merged.items():
        yield _layer(engine, family, name, tuple(single[member] for member in members))
    for name, part in single.items():
        if name not in inside:
            yield _layer(engine, family, name, (part,))


def _layer(
    engine: EngineRules, family: EngineFamily, name: str, parts: tuple[LayerPart, ...]
) -> EngineLayer:
    leaf = name.rpartition(".")[2]
    split: Split = "columns"
    if leaf in engine.whole or parts[0].kind == "router":
        split = "whole"
    elif leaf in engine.rows:
        split = "rows"
    elif layer_index(name) is None and parts[0].kind != "head":
        split = "whole"
    return EngineLayer(renamed(name, family.rename), parts, split)


def _expert_block(part: LayerPart) -> str | None:
    return expert_block(part.name) if part.kind in ("linear", "experts") else None
