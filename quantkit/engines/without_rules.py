"""For which models the data of an engine has rules, and which the engine does not run at all."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.engines.loadable import Loadable
from quantkit.engines.reasons import Reason
from quantkit.engines.rules import EngineFamily, EngineRules


def without_rules(engine: EngineRules, family: EngineFamily, candidate: Loadable) -> str:
    """Why the engine's data says nothing of this model; "" where it has rules.

    A layout without a model (GGUF read from its file) needs none.
    """
    if not candidate.parts:
        return ""
    kind = next(iter(candidate.model_types), "this model")
    if not family.known:
        return f"no rules for {kind} in {engine.name} {engine.read}'s data"
    other = _unregistered(engine, candidate)
    if other:
        return (
            f"{engine.name} {engine.read} has no class for {other} and runs it through "
            "Transformers, for which its data has no rules"
        )
    return ""


def check_architecture(
    engine: EngineRules, family: EngineFamily, candidate: Loadable
) -> Iterator[Reason]:
    """Code `engine.architecture`: a model that the engine does not run, or not quantized."""
    other = _unregistered(engine, candidate)
    if other in engine.incompatible:
        yield Reason(
            "engine.architecture",
            f"{engine.name} {engine.read} has no class for {other}, and its Transformers backend "
            "does not take that one",
            "serve it with another engine",
        )
    elif family.refused:
        yield Reason(
            "engine.architecture",
            f"{engine.name} loads no quantized {family.types[0]}: {family.refused}",
            "serve it with another engine, or in 16 bit",
        )


def _unregistered(engine: EngineRules, candidate: Loadable) -> str:
    """The first architecture of a config.json none of which is in the engine's registry."""
    found = [name for name in candidate.config.get("architectures") or () if isinstance(name, str)]
    bases = {name.replace("ForSequenceClassification", "ForCausalLM") for name in found}
    return found[0] if found and engine.architectures.isdisjoint({*found, *bases}) else ""
