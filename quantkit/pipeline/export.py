"""export(): the checkpoint of a saved state, by the recipe that it remembers or the plan it
amounts to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.backends.environments import find_interpreter, library_versions
from quantkit.backends.environments.device import resolve_device
from quantkit.backends.process.job import Job, Reporter
from quantkit.backends.registry import MODELOPT, Backend
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.hub import resolve_model
from quantkit.checkpoint.network.modules import classify, linear_modules
from quantkit.checkpoint.provenance import Calibration
from quantkit.checkpoint.scan import scan
from quantkit.errors import BackendError, InputError, command
from quantkit.formats.registry import detect
from quantkit.pipeline.finish import finish
from quantkit.pipeline.plan import Plan, kept_layers, make_plan, plan_of_layers
from quantkit.pipeline.process import run_logged
from quantkit.pipeline.publish import check_apart, check_space, check_target, staged
from quantkit.pipeline.request import ExportRequest, Outcome
from quantkit.pipeline.state import check_state, read_state_note, refuse_mismatch
from quantkit.recipe.model import Recipe


def export(request: ExportRequest, ui: Reporter) -> Outcome:
    """Write the checkpoint of a saved fake-quantized state; never calibrates.

    Raises InputError when the state file, the base model or the library is not the one that the
    state was made with; otherwise as `quantize`.
    """
    ui.stage("check state")
    check_state(request.restore)
    note = read_state_note(request.restore)
    model = request.model or (note or {}).get("model", "")
    if not model:
        raise InputError(
            f"{request.restore} does not say which model it was made from.",
            hint=command(
                "export", "--restore", request.restore, "--out", request.out, "--model", "BASE"
            ),
            code="state.no_model",
        )
    source = open_checkpoint(resolve_model(model, trust_remote_code=request.trust_remote_code))
    check_apart(request.out, source.path, request.restore)
    check_target(request.out, overwrite=request.overwrite)
    ui.stage("scan source", source.weight_bytes, "bytes")
    found = scan(source, ui.advance)
    backend = MODELOPT
    python = find_interpreter(backend, request.python)
    job = Job(
        task="export",
        backend=backend.name,
        adapter=backend.adapter,
        method="export",
        model=str(source.path.resolve()),
        out="",
        scheme=None,
        device=resolve_device(request.device),
        restore=str(request.restore.resolve()),
        trust_remote_code=request.trust_remote_code,
    )
    recipe = None
    if note:
        refuse_mismatch(
            request.restore,
            note,
            model=source.path,
            fingerprint=found.fingerprint,
            versions=library_versions(python, [backend.distribution]),
            library=backend.distribution,
        )
        recipe = stored_recipe(note, request.restore)
        plan = make_plan(source, recipe, trust_remote_code=request.trust_remote_code)
        check_space(request.out, plan.estimate.disk, "the checkpoint")
        job = replace(
            job,
            method=recipe.name,
            scheme=recipe.resolved_scheme(),
            kv_cache=recipe.kv_cache,
            layers=dict(plan.layers),
            keep=kept_layers(source, plan),
            options=recipe.options,
            shard_size=recipe.shard_bytes(),
        )
    with staged(request.out, overwrite=request.overwrite) as partial:
        result = run_logged(job, partial, python, request.out, ui)
        if recipe is None:
            plan = plan_of_export(partial, source, backend)
        calibration = state_calibration(note)
        return finish(
            partial,
            request.out,
            model,
            plan,
            source,
            found.fingerprint,
            calibration,
            result,
            ui,
            trust_remote_code=request.trust_remote_code,
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


def state_calibration(note: dict[str, Any] | None) -> Calibration | None:
    """The calibration that a state remembers; "unknown" for one that was made elsewhere."""
    if note is None:
        return Calibration(name="unknown")
    return Calibration.of({**note.get("calibration", {}), **(note.get("mixture") or {})})


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
