"""The gates that a run holds: the scheme's, the recipe's and the command's, if they can be told."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.config import experts_per_token
from quantkit.checkpoint.network.parameters import active_parameters
from quantkit.formats.registry import detect
from quantkit.recipe.gates import Gate, parse_gate
from quantkit.validation.ask.picture_prompts import sees
from quantkit.validation.judge.default_gates import default_gates
from quantkit.validation.judge.metrics import OF_CACHE, OF_RTN, ROUTING
from quantkit.validation.judge.pictures import OF_PICTURES
from quantkit.validation.judge.verdicts import accepted, chosen_gates
from quantkit.validation.preflight import Candidate
from quantkit.verification import VerifyReport


def gates_of(
    candidate: Candidate, integrity: VerifyReport, asked: list[Gate]
) -> tuple[list[Gate], list[str]]:
    """The scheme's gates, the recipe's and the command's (of a metric the last one counts), and
    warnings of what the recipe loosens."""
    recipe_gates = candidate.provenance.gates if candidate.provenance else ()
    base = candidate.baseline
    schemes = {layer.scheme for layer in integrity.layers}
    size = active_parameters(base.shapes, base.config)
    defaults = default_gates(
        schemes,
        experts_per_token(base.config),
        size,
        _kv_cache(candidate),
        tower_schemes=_tower_schemes(candidate, integrity),
    )
    stated = [parse_gate(text, "recipe") for text in recipe_gates]
    counted, warnings = accepted(stated, defaults)
    return chosen_gates(defaults, counted, asked), warnings


def _tower_schemes(candidate: Candidate, integrity: VerifyReport) -> set[str] | None:
    """The schemes of the layers that a picture passes before the language model's blocks; None
    without a vision tower."""
    if not sees(candidate.held):
        return None
    kinds = {module.name: module.kind for module in candidate.baseline.modules}
    before = ("tower", "embedding")
    return {one.scheme for one in integrity.layers if kinds.get(one.module) in before}


def _kv_cache(candidate: Candidate) -> str:
    """The key-value cache that the checkpoint declares."""
    held = candidate.held
    return detect(held).declare(held).kv_cache if isinstance(held, Checkpoint) else "none"


def askable(gates: list[Gate], engine: str) -> tuple[list[Gate], list[str]]:
    """Without the default gates that only the builtin runtime could tell, and notes on them."""
    if engine == "builtin":
        return gates, []
    why = {
        ROUTING: f"{engine} does not show its routers",
        **dict.fromkeys(OF_PICTURES, f"{engine} is shown no pictures here"),
        **dict.fromkeys(OF_RTN, f"{engine} cannot hold the baseline rounded to nearest"),
        **dict.fromkeys(OF_CACHE, f"{engine} does not show its key-value cache"),
    }
    return measurable(gates, why)


def measurable(gates: list[Gate], unmeasured: Mapping[str, str]) -> tuple[list[Gate], list[str]]:
    """Without the default gates of metrics that cannot be measured here (metric → why), and notes
    on them."""
    out = [g for g in gates if g.source == "default" and g.metric in unmeasured]
    notes = []
    for why in dict.fromkeys(unmeasured[gate.metric] for gate in out):
        names = [gate.metric for gate in out if unmeasured[gate.metric] == why]
        notes.append(f"{' and '.join(names)} {'are' if names[1:] else 'is'} not gated: {why}")
    return [gate for gate in gates if gate not in out], notes
