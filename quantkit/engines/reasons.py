"""Why an engine will not load a checkpoint, and what would change that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

NAMED_BY_LEAF = ("engine.ignore_", "engine.mixed_", "engine.target_")
"""Reasons that are alike for all layers with the same last name part."""


@dataclass(frozen=True)
class Reason:
    """`code` is stable; `where` the engine's first layer that it is about ("" : the whole), `count`
    how many there are. `fix` names the change that would make it load."""

    code: str
    message: str
    fix: str
    where: str = ""
    count: int = 1

    @property
    def text(self) -> str:
        more = f" (and {self.count - 1} more layers)" if self.count > 1 else ""
        return f"{self.message}{more}"


def condensed(reasons: Iterable[Reason]) -> Iterator[Reason]:
    """One reason for all layers about which the same is to be said but for their names."""
    groups: dict[tuple[str, str], list[Reason]] = {}
    for reason in reasons:
        block, _, leaf = reason.where.rpartition(".")
        said = reason.message.replace(reason.where, "…") if reason.where else reason.message
        in_names = reason.code.startswith(NAMED_BY_LEAF)
        key = (reason.code, leaf if in_names else said.replace(block, "…") if block else said)
        groups.setdefault(key, []).append(reason)
    for found in groups.values():
        first = found[0]
        yield Reason(first.code, first.message, first.fix, first.where, len(found))
