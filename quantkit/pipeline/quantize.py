"""quantize() and its preflight: the file to read first.

recipe → plan → the backend's way (`ways.py`: tokens and a worker, or shard by shard) → seal →
verify → publish. All that can be refused is refused before the long job; nothing appears under the
output's name unverified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quantkit.backends.environments.device import resolve_devices
from quantkit.backends.environments.room import refuse_absent_gpus
from quantkit.backends.process.job import Reporter
from quantkit.backends.registry import backend_named
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.hub import open_for_plan, resolve_model
from quantkit.formats import fp8
from quantkit.formats.quantized import QuantizedCheckpoint
from quantkit.pipeline.calibration_data import text_only_note
from quantkit.pipeline.engine_view import check_engines
from quantkit.pipeline.placement import place, refuse_too_large
from quantkit.pipeline.plan import Plan, make_plan
from quantkit.pipeline.publish import check_apart, check_target
from quantkit.pipeline.quantized_source import as_subject, dequantized, planned
from quantkit.pipeline.refuse_beyond_dense import refuse_beyond_dense
from quantkit.pipeline.request import Outcome, Request
from quantkit.pipeline.ways import way_of
from quantkit.verification.configuration.completeness import refuse_incomplete


def preflight(request: Request) -> tuple[Checkpoint, Plan]:
    """Open the model and plan the job; every refusal that needs no weights happens here."""
    path = resolve_model(request.model, trust_remote_code=request.trust_remote_code)
    source = _in_16_bit(request, open_checkpoint(path))
    plan = check_engines(source, _decide(request, source))
    devices = resolve_devices(request.device)
    if request.executor == "local":
        refuse_absent_gpus(devices)
    refuse_too_large(plan.placed, plan.recipe, devices)
    return source, plan


def plan_only(request: Request) -> tuple[Checkpoint, Plan]:
    """As `preflight`, for a model whose weights may be absent or only on the hub: headers are
    fetched, or shapes derived. Engines that will not load the result are no error here."""
    source = open_for_plan(request.model, trust_remote_code=request.trust_remote_code)
    subject = _quantized(request, source)
    source = planned(subject) if subject else source
    return source, _decide(request, source)


def _in_16_bit(request: Request, source: Checkpoint) -> Checkpoint:
    """The source, or the BF16 copy of a quantized one, made once its plan refuses nothing."""
    subject = _quantized(request, source)
    if subject is None:
        return source
    _decide(request, planned(subject))
    return open_checkpoint(dequantized(subject))


def _quantized(request: Request, source: Checkpoint) -> QuantizedCheckpoint | None:
    """A quantized source that has to be dequantized before the backend can read it."""
    streamed = backend_named(request.recipe.backend).reads_fp8_blocks
    return None if streamed and fp8.recognises(source) else as_subject(source)


def _decide(request: Request, source: Checkpoint) -> Plan:
    """The plan, or the refusal that `plan` and `quantize` share: all that no weights tell."""
    devices = resolve_devices(request.device)
    state = request.checkpoint_save is not None
    plan = make_plan(
        source,
        request.recipe,
        device=devices[0],
        trust_remote_code=request.trust_remote_code,
        state=state,
    )
    room = _room(request, plan)
    placed = place(source, plan.recipe, plan.backend, devices, state=state, room=room)
    plan = replace(plan, placed=placed)
    refuse_incomplete(source)
    refuse_beyond_dense(source, plan, request.model)
    way_of(plan.backend).check(source, plan)
    note = text_only_note(source, plan)
    return replace(plan, notes=(*plan.notes, note)) if note else plan


def _room(request: Request, plan: Plan) -> Callable[[str], int | None] | None:
    """What tells the free memory where a library will work: a cluster's, or None for here."""
    if request.executor == "local" or plan.backend.way == "streaming":
        return None
    from quantkit.backends.process.on_ray import cluster_room

    return cluster_room()


def quantize(request: Request, ui: Reporter) -> Outcome:
    """Calibrate, quantize, seal, verify and publish one checkpoint.

    Raises InputError for what is wrong with the request or the model (before any work),
    BackendError when the library or its process failed, CheckError when the result did not verify.
    In every case `request.out` is as it was before.
    """
    ui.stage("plan")
    source, plan = preflight(request)
    check_apart(request.out, source.path)
    check_target(request.out, overwrite=request.overwrite)
    if plan.placed and plan.placed.doubt:
        ui.note(plan.placed.doubt)
    return way_of(plan.backend).run(request, source, plan, ui)
