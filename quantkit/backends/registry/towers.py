"""What each library does with models that have towers: `towers.yaml`, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from quantkit.backends.registry.backend import Backend
    from quantkit.recipe.model import Recipe


@dataclass(frozen=True)
class Towers:
    """The families of models with towers, by the `model_type` of config.json, of a library.

    takes: families whose language model it quantizes, calibrated with text.
    cannot: why it does not, by family.
    schemes: family → scheme → why that scheme does not work there.
    others: why families that nobody tried are refused; "": they are not.
    """

    takes: frozenset[str] = frozenset()
    cannot: Mapping[str, str] = field(default_factory=dict)
    schemes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    others: str = ""


@cache
def towers() -> dict[str, Towers]:
    """Backend → what it does with towers; a backend that is not in it takes no model with one."""
    text = Path(__file__).with_name("towers.yaml").read_text(encoding="utf-8")
    return {
        name: Towers(
            frozenset(entry["takes"]),
            entry.get("cannot") or {},
            entry.get("schemes") or {},
            entry.get("others") or "",
        )
        for name, entry in yaml.safe_load(text).items()
    }


def tower_refusal(backend: Backend, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Why the library cannot quantize the language model of this multi-modal family, or None."""
    known = towers().get(backend.name)
    if known is None:
        return f"{backend.name} quantizes language models without one here"
    family, library = str(config.get("model_type")), backend.distribution
    cannot = known.cannot.get(family) or ("" if family in known.takes else known.others)
    if cannot:
        return f"{library} does not quantize {family}: {cannot}"
    if reason := known.schemes.get(family, {}).get(recipe.scheme):
        return f"{library} does not write {recipe.scheme} of {family}: {reason}"
    return None


def untried_towers(backend: Backend, config: Mapping[str, Any]) -> str | None:
    """A warning that nobody tried the library with this multi-modal family, or None."""
    known = towers().get(backend.name)
    family = str(config.get("model_type"))
    if known is None or family in known.takes:
        return None
    return (
        f"{backend.distribution} was not tried with {family}: which modules are its language "
        "model's is told by the names and shapes of its tensors"
    )
