"""The gates that a run holds: the scheme's, the recipe's and the command's, if they can be told."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.checkpoint.network.config import experts_per_token
from quantkit.recipe.gates import Gate, parse_gate
from quantkit.validation.judge.default_gates import default_gates
from quantkit.validation.judge.metrics import BUILTIN_ONLY, ROUTING
from quantkit.validation.judge.verdicts import accepted, chosen_gates
from quantkit.validation.preflight import Candidate
from quantkit.verification import VerifyReport


def gates_of(
    candidate: Candidate, integrity: VerifyReport, asked: list[Gate]
) -> tuple[list[Gate], list[str]]:
    """The scheme's gates, the recipe's and the command's (of a metric the last one counts), and
    warnings of what the recipe loosens."""
    recipe_gates = candidate.provenance.gates if candidate.provenance else ()
    chosen = experts_per_token(candidate.baseline.config)
    defaults = default_gates({layer.scheme for layer in integrity.layers}, chosen)
    stated = [parse_gate(text, "recipe") for text in recipe_gates]
    counted, warnings = accepted(stated, defaults)
    return chosen_gates(defaults, counted, asked), warnings


def askable(gates: list[Gate], engine: str) -> tuple[list[Gate], list[str]]:
    """Without the default gates that only logits could tell, where the engine gives none."""
    if engine == "builtin":
        return gates, []
    out = [g for g in gates if g.source == "default" and g.metric in BUILTIN_ONLY]
    what = {ROUTING: "does not show its routers"}
    notes = [
        f"{gate.metric} is not gated: {engine} {what.get(gate.metric, 'gives no logits')}"
        for gate in out
    ]
    return [gate for gate in gates if gate not in out], notes


def measurable(gates: list[Gate], routing: Mapping[int, float]) -> tuple[list[Gate], list[str]]:
    """Without the default gate of a mixture whose routers cannot be seen, and a note of it."""
    if routing:
        return gates, []
    out = [g for g in gates if g.source == "default" and g.metric == ROUTING]
    notes = [
        f"{gate.metric} is not gated: the choices of this family's routers cannot be seen"
        for gate in out
    ]
    return [gate for gate in gates if gate not in out], notes
