"""What a saved state was made with: the recipe it remembers, or the plan it amounts to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.backends.registry import Backend
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.network.modules import classify, linear_modules
from quantkit.errors import BackendError, InputError
from quantkit.formats.registry import detect
from quantkit.plan import Plan, plan_of_layers
from quantkit.recipe.model import Recipe


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


def state_calibration(note: dict[str, Any] | None) -> dict[str, Any]:
    """The calibration that a state remembers; "unknown" for one that was made elsewhere."""
    if note is None:
        return {"name": "unknown", "digest": None}
    return {**note.get("calibration", {}), **(note.get("mixture") or {})}


def plan_of_export(out: Path, source: Checkpoint, backend: Backend) -> Plan:
    """The plan that a state made elsewhere amounts to, read off what the library exported.

    Raises BackendError when the exported format is none that this backend's recipes describe.
    """
    exported = open_checkpoint(out)
    declaration = detect(exported).declare(exported)
    algorithm = str((exported.quantization_config or {}).get("quant_algo"))
    scheme = next(
        (s for s, method in backend.methods.items() if method.algorithm == algorithm), None
    )
    if scheme is None or not declaration.layers:
        raise BackendError(
            f"The state exports as {algorithm}, which no {backend.name} recipe describes "
            f"({', '.join(sorted(method.algorithm for method in backend.methods.values()))}).",
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
