"""The groups of layers that must share a scheme, as an engine fuses them, and what each may get."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.modules import (
    Module,
    expert_groups,
    fused_groups,
    layer_index,
    linear_modules,
    named_by,
)
from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.engines import LayerPart, engine_named
from quantkit.engines.names import layers
from quantkit.errors import InputError
from quantkit.pipeline.plan import fitted
from quantkit.recipe.documents import meant
from quantkit.recipe.model import SMALLEST_GROUP

KEPT = "keep"
"""In the place of a scheme: 16 bit."""


@dataclass(frozen=True)
class Group:
    """Modules that get one scheme: `name` is that of the engine's layer, or of the first of them.

    experts: whether it holds the experts of a layer.
    """

    name: str
    modules: tuple[Module, ...]
    experts: bool = False

    @property
    def layer(self) -> int | None:
        """The decoder layer that it belongs to."""
        return layer_index(self.modules[0].name)

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(prod(module.shape) for module in self.modules)

    def fitted(self, scheme: Scheme) -> Scheme | None:
        """The scheme in groups that divide the columns of every module; None where none do."""
        found = {fitted(module, scheme) for module in self.modules}
        fits = [one for one in found if one is not None]
        if len(fits) < len(found):
            return None
        return min(fits, key=lambda one: one.weight.group_size or 0)

    def bits(self, scheme: Scheme | None) -> float:
        """Stored bits of all its weights, scales included; None: 16 bit."""
        if scheme is None:
            return 16.0 * self.weights
        return sum(
            scheme.weight.bits_per_weight((module.shape[-2], module.shape[-1])) * prod(module.shape)
            for module in self.modules
        )


def fusable_groups(source: Checkpoint, engine: str) -> list[Group]:
    """The groups of the linear layers and experts of a model, in its order, as `engine` fuses them.

    Where the layouts here ask for more to be alike than the engine does, so do the groups.
    """
    modules = {
        module.name: module
        for module in linear_modules(source.modules)
        if named_by(module, ["@linear"])
    }
    rules = engine_named(engine)
    parts = [LayerPart(m.name, m.kind, m.shape) for m in modules.values()]
    built = layers(rules, rules.family(source.config), parts)
    sets = [
        *((layer.name, [part.name for part in layer.parts]) for layer in built),
        *(("", list(names)) for names in [*fused_groups(modules), *expert_groups(modules)]),
    ]
    order = list(modules)
    joined = sorted(_joined(sets), key=lambda one: min(order.index(name) for name in one[1]))
    return [
        Group(
            name or next(iter(names)),
            tuple(modules[at] for at in order if at in names),
            any(modules[at].kind == "experts" or ".experts." in at for at in names),
        )
        for name, names in joined
    ]


def schemes_named(names: Sequence[str]) -> dict[str, Scheme]:
    """SCHEME or SCHEME:GROUP_SIZE → the scheme. Raises InputError for what is none."""
    found = {}
    for text in names:
        name, sign, size = text.partition(":")
        if name not in SCHEMES:
            raise InputError(
                f"There is no scheme {name!r}.{meant(name, SCHEMES)}",
                hint=f"one of {', '.join(sorted(SCHEMES))}",
                code="search.unknown_scheme",
            )
        scheme = SCHEMES[name]
        if sign:
            free = scheme.weight.granularity == "group" and scheme.weight.scale == "float"
            if not free or not size.isdigit() or int(size) < SMALLEST_GROUP:
                why = "no group size" if free else f"{name} has no group size to choose"
                raise InputError(
                    f"The scheme {text!r}: {why}.",
                    hint="for example w4a16:64",
                    code="search.group_size",
                )
            scheme = scheme.with_weight(group_size=int(size))
        found[text] = scheme
    return found


def _joined(sets: Iterable[tuple[str, list[str]]]) -> list[tuple[str, set[str]]]:
    """Sets that share a member as one, with the first name that any of them has."""
    found: list[tuple[str, set[str]]] = []
    for name, names in sets:
        new = set(names)
        touching = [one for one in found if one[1] & new]
        name = next((title for title, _ in touching if title), name)
        for one in touching:
            found.remove(one)
            new |= one[1]
        found.append((name, new))
    return found
