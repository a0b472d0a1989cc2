"""What each library does with the experts of each family: `mixtures.yaml`, read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.checkpoint.network.fused_experts import expert_block
from quantkit.checkpoint.network.language import text_config

if TYPE_CHECKING:
    from quantkit.backends.registry.backend import Backend
    from quantkit.recipe.model import Recipe


@dataclass(frozen=True)
class Mixtures:
    """The families of mixtures, by the `model_type` of config.json, that a library was tried with:
    that of the whole model where it is listed, of its language model elsewhere.

    calibrates: those whose every expert it can be made to see.
    routed: why it reaches only the experts that tokens are routed to, by family.
    cannot: why it does not quantize the experts at all, by family.
    whole: why it writes no sound checkpoint whatever is quantized, by family.
    schemes: family → scheme → why that scheme does not work there.
    algorithms: algorithm (`Method.algorithm`) → why no mixture goes through it.
    """

    calibrates: frozenset[str] = frozenset()
    routed: Mapping[str, str] = field(default_factory=dict)
    cannot: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    schemes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    algorithms: Mapping[str, str] = field(default_factory=dict)

    def family(self, config: Mapping[str, Any]) -> str:
        """What these tables call the model."""
        whole = str(config.get("model_type"))
        tables = (self.calibrates, self.routed, self.cannot, self.whole, self.schemes)
        listed = any(whole in table for table in tables)
        return whole if listed else str(text_config(config).get("model_type"))


@cache
def mixtures() -> dict[str, Mixtures]:
    """Backend → what it does with experts; a backend that is not in it takes dense models only."""
    text = Path(__file__).with_name("mixtures.yaml").read_text(encoding="utf-8")
    return {
        name: Mixtures(
            frozenset(entry["calibrates"]),
            entry.get("routed") or {},
            entry.get("cannot") or {},
            entry.get("whole") or {},
            entry.get("schemes") or {},
            entry.get("algorithms") or {},
        )
        for name, entry in yaml.safe_load(text).items()
    }


def family_refusal(backend: Backend, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Why the library writes no sound checkpoint of this family, a dense one too, or None."""
    known = mixtures().get(backend.name, Mixtures())
    family, library = known.family(config), backend.distribution
    if reason := known.whole.get(family):
        return f"{library} does not write {family}: {reason}"
    if reason := known.schemes.get(family, {}).get(recipe.scheme):
        return f"{library} does not write {recipe.scheme} of {family}: {reason}"
    return None


def mixture_refusal(
    backend: Backend, recipe: Recipe, layers: Iterable[str], config: Mapping[str, Any]
) -> str | None:
    """Why the library cannot do what is planned for a mixture of this family, or None.

    `layers` are the modules that the plan quantizes.
    """
    known = mixtures().get(backend.name)
    if known is None:
        return f"{backend.name} quantizes dense language models here"
    if reason := family_refusal(backend, recipe, config):
        return reason
    family, library = known.family(config), backend.distribution
    algorithm = backend.method(recipe).algorithm
    if reason := known.algorithms.get(algorithm):
        return f"{library} quantizes no mixture by {algorithm} here: {reason}"
    if not any(map(expert_block, layers)) or family in known.calibrates:
        return None
    if reason := known.cannot.get(family):
        without = "keep them in 16 bit with --set ignore+=@experts"
        return f"{library} does not quantize the experts of {family}: {reason} ({without})"
    reason = known.routed.get(family)
    if reason is None:
        tried = ", ".join(sorted(known.calibrates | set(known.routed)))
        return f"{library} was not tried with the experts of {family}, only with those of {tried}"
    if recipe.experts == "routed" or not backend.method(recipe).calibrated:
        return None
    instead = "--set experts=routed calibrates those that tokens are routed to"
    return f"{library} cannot bring every token to every expert of {family}: {reason} ({instead})"
