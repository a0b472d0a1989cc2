"""Whether a saved state belongs to the base model and library at hand, and what made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.environments import library_versions
from quantkit.errors import BackendError, InputError
from quantkit.formats.registry import detect
from quantkit.modules import classify, linear_modules
from quantkit.plan import Plan, plan_of_layers
from quantkit.recipe import Recipe
from quantkit.registry import Backend

UNKNOWN_CALIBRATION: dict[str, Any] = {"name": "unknown", "digest": None}
_MUST_MATCH = ("nvidia-modelopt",)


def refuse_other_origin(note: dict[str, Any], fingerprint: str, python: Path, state: Path) -> None:
    """Raise InputError that lists what differs from when the state was saved."""
    differences = []
    remembered = note.get("source", {}).get("fingerprint")
    if remembered != fingerprint:
        differences.append(
            f"the base model has the fingerprint {fingerprint[:16]}, "
            f"the state was made from {str(remembered)[:16]} ({note.get('source', {}).get('name')})"
        )
    here = library_versions(python, _MUST_MATCH)
    for name in _MUST_MATCH:
        then = note.get("versions", {}).get(name)
        if then != here.get(name):
            differences.append(f"{name} is {here.get(name)} here, {then} made the state")
    if differences:
        raise InputError(
            f"{state} cannot be exported: {'; '.join(differences)}.",
            hint="name the model it was made from with --model, and an interpreter that has the "
            "same library version with --python",
            code="state.other_origin",
        )


def stored_recipe(note: dict[str, Any], state: Path) -> Recipe:
    """The recipe that a state file remembers, checked like any other."""
    try:
        return Recipe.model_validate(note.get("recipe"))
    except ValidationError as error:
        raise InputError(
            f"{state} holds a recipe that this quantkit does not understand: "
            f"{error.errors()[0]['msg']}.",
            hint="export it with the quantkit that saved it",
            code="state.bad_note",
        ) from error


def plan_of_export(out: Path, source: Checkpoint, backend: Backend) -> Plan:
    """The plan that a state made elsewhere amounts to, read off what the library exported.

    Raises BackendError when the exported format is none that this backend's recipes describe.
    """
    exported = open_checkpoint(out)
    declaration = detect(exported).declare(exported)
    algorithm = str((exported.quantization_config or {}).get("quant_algo"))
    scheme = next((s for s, name in backend.methods.items() if name == algorithm), None)
    if scheme is None or not declaration.layers:
        raise BackendError(
            f"The state exports as {algorithm}, which no {backend.name} recipe describes "
            f"({', '.join(sorted(backend.methods.values()))}).",
            hint="quantkit methods",
            code="state.unknown_scheme",
        )
    first = next(iter(declaration.layers.values())).scheme
    recipe = Recipe(
        name=f"{backend.name}_{scheme}",
        description=f"{algorithm}, from a state made elsewhere",
        backend=backend.name,
        scheme=scheme,
        group_size=first.weight.group_size if first.weight.scale == "float" else None,
        calibration=None,
    )
    layers = {name: layer.scheme for name, layer in declaration.layers.items()}
    shapes = {name: info.shape for name, info in source.tensors.items()}
    modules = linear_modules(classify(shapes, source.config))
    kept = {m.name: "16 bit in the state" for m in modules if m.name not in layers}
    return plan_of_layers(source, recipe, layers, kept, ())
