"""An assignment as an ordinary recipe of the streaming backend: a scheme, and overrides."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.paths import write_whole
from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.recipe.model import Recipe
from quantkit.validation.search.assign import Assignment
from quantkit.validation.search.groups import KEPT, Group

_NUMBERED = re.compile(r"^(.*?\b(?:layers|h|blocks)\.)(\d+)(\..+)$")
_EXPERT = re.compile(r"(\.experts\.)\d+(\.)")


def recipe_of(
    name: str,
    base: Mapping[str, Any],
    groups: Sequence[Group],
    schemes: Mapping[str, Mapping[str, Scheme]],
    assignment: Assignment,
) -> Recipe:
    """The recipe that gives every group its scheme; `base` holds the keys that it adds to.

    The scheme of most modules is the recipe's own; all others, and group sizes that are not the
    scheme's, are overrides of it.
    """
    chosen: dict[str, tuple[str, int | None]] = {}
    modules: dict[str, Module] = {}
    for group in groups:
        title = assignment[group.name]
        scheme = None if title == KEPT else schemes[group.name][title]
        for module in group.modules:
            modules[module.name] = module
            chosen[module.name] = (KEPT, None) if scheme is None else (scheme.name, _size(scheme))
    counted = Counter(pair for pair in chosen.values() if pair[0] != KEPT)
    own = counted.most_common(1)[0][0]
    overrides = [
        {"match": match, "scheme": scheme, **({"group_size": size} if size else {})}
        for (scheme, size), names in _by_choice(chosen, own).items()
        for match in _patterns(names)
    ]
    data = {
        **base,
        "name": name,
        "backend": "rtn",
        "scheme": own[0],
        "calibration": None,
        "overrides": [*overrides, *base.get("overrides", [])],
    }
    if own[1] is not None and SCHEMES[own[0]].weight.group_size != own[1]:
        data["group_size"] = own[1]
    return Recipe.model_validate(data)


def write_recipe(recipe: Recipe, file: Path, about: Sequence[str]) -> None:
    """The recipe as a YAML file that a person can read: what is not as by default, comments before.

    Raises OSError.
    """
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    data["calibration"] = None
    text = "".join(f"# {line}\n" for line in about)
    text += yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode())
    file.stat()


def _size(scheme: Scheme) -> int | None:
    """The group size, of a scheme that lets it be chosen."""
    free = scheme.weight.granularity == "group" and scheme.weight.scale == "float"
    return scheme.weight.group_size if free else None


def _by_choice(
    chosen: Mapping[str, tuple[str, int | None]], own: tuple[str, int | None]
) -> dict[tuple[str, int | None], list[str]]:
    found: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    for name, pair in chosen.items():
        if pair != own:
            found[pair].append(name)
    return found


def _patterns(names: Sequence[str]) -> Iterator[str]:
    """Expressions that match exactly these modules: those of several layers in one, and all experts
    of a layer, which are alike."""
    layers: dict[tuple[str, str], dict[int, None]] = defaultdict(dict)
    for name in names:
        found = _NUMBERED.match(name)
        if found is None:
            yield f"re:{re.escape(name)}$"
        else:
            rest = _EXPERT.sub(r"\g<1>*\2", found[3])
            layers[found[1], rest][int(found[2])] = None
    for (start, rest), numbers in layers.items():
        joined = "|".join(map(str, sorted(numbers)))
        end = re.escape(rest).replace(r"\*", r"\d+")
        yield f"re:{re.escape(start)}({joined}){end}$"
