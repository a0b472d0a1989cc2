"""The way of a library's backend: scan, tokens, the worker, what it left."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.backends.environments import find_interpreter
from quantkit.backends.environments.device import resolve_devices
from quantkit.backends.process.job import NO_DATA, Job, Reporter, Result
from quantkit.backends.process.parent import run_worker
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.provenance import LOG, Calibration
from quantkit.checkpoint.scan import Scan, refuse_bad_weights, scan
from quantkit.errors import BackendError, InputError
from quantkit.pipeline.finish import finish
from quantkit.pipeline.followed import as_written, without
from quantkit.pipeline.plan import Plan, kept_layers
from quantkit.pipeline.publish import check_space, check_target, staged
from quantkit.pipeline.request import Outcome, Request

if TYPE_CHECKING:
    from quantkit.calibration import CalibrationConfig, TokenFile


def check(source: Checkpoint, plan: Plan) -> None:  # noqa: ARG001 - see `Way`
    """Raise InputError for a calibration that does not exist or whose data file is missing."""
    _mixture_asked(plan)


def run(request: Request, source: Checkpoint, plan: Plan, ui: Reporter) -> Outcome:
    """Calibrate and quantize in the worker, then seal, verify and publish.

    Raises InputError for what is wrong with the request or the weights, BackendError when the
    library or its process failed, CheckError when the result did not verify.
    """
    _refuse_stream_flags(request, plan)
    check_space(request.out, plan.estimate.disk, "the checkpoint")
    if request.checkpoint_save:
        _check_state_file(request.checkpoint_save, request.overwrite, source, plan)
    python = find_interpreter(plan.backend, request.python or request.recipe.python)
    with staged(request.out, overwrite=request.overwrite) as partial:
        ui.stage("scan source", source.weight_bytes, "bytes")
        found = scan(source, ui.advance)
        refuse_bad_weights(found, source)
        tokens = _tokens(request, plan, source, ui)
        mixture = _mixture(plan, tokens)
        note = _state_note(request, plan, source, found, mixture)
        job = _job(request, plan, source, tokens, note)
        result = run_logged(job, partial, python, request.out, ui)
        result.notes += tokens.summary["notes"] if tokens else []
        plan = as_written(without(plan, source, result.kept), partial)
        used = result.calibration != NO_DATA
        if used:
            _check_tokens(result, tokens)
        seen = {**result.calibration, **mixture} if mixture and used else {}
        calibration = Calibration.of(seen)
        return finish(
            partial,
            request.out,
            request.model,
            plan,
            source,
            found.fingerprint,
            calibration,
            result,
            ui,
            trust_remote_code=request.trust_remote_code,
        )


def _mixture_asked(plan: Plan) -> CalibrationConfig | None:
    """The calibration that the method will be shown, None where it needs none."""
    choice = plan.recipe.calibration
    if not plan.method.calibrated or choice is None:
        return None
    from quantkit.calibration import load_calibration
    from quantkit.calibration.config import FileSource
    from quantkit.calibration.sources import files_of

    config = load_calibration(choice.name, choice.overrides())
    for source in config.sources:
        if isinstance(source, FileSource):
            files_of(source)
    return config


def _refuse_stream_flags(request: Request, plan: Plan) -> None:
    asked = {
        "--resume": request.resume,
        "--memory": request.memory is not None,
        "--jobs": request.jobs is not None,
        "--executor": request.executor != "local",
    }
    flags = [flag for flag, given in asked.items() if given]
    if flags:
        raise InputError(
            f"{', '.join(flags)} is for the built-in rtn_* methods: {plan.backend.distribution} "
            "holds the whole model in one process and cannot stop and go on.",
            hint=f"leave out {' '.join(flags)}",
            code="request.stream_only",
        )


def _state_note(
    request: Request,
    plan: Plan,
    source: Checkpoint,
    found: Scan,
    mixture: dict[str, Any] | None,
) -> dict[str, Any]:
    """What a state file remembers beside what the worker knows."""
    local = Path(request.model).exists()
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "model": str(source.path.resolve()) if local else request.model,
        "fingerprint": found.fingerprint,
        "mixture": mixture,
    }


def _check_state_file(file: Path, overwrite: bool, source: Checkpoint, plan: Plan) -> None:
    if source.path.resolve() in file.resolve().parents:
        raise InputError(
            f"The state file {file} lies in the source {source.path}.",
            hint="choose another --checkpoint-save",
            code="output.is_input",
        )
    if file.exists() and not overwrite:
        raise InputError(
            f"The state file {file} exists.",
            hint="choose another --checkpoint-save, or pass --overwrite",
            code="output.exists",
        )
    check_target(file.with_name(file.name + ".dir"), overwrite=True)
    check_space(file, round(plan.estimate.source * 1.05), "the saved state")


def _tokens(request: Request, plan: Plan, source: Checkpoint, ui: Reporter) -> TokenFile | None:
    config = _mixture_asked(plan)
    if config is None:
        return None
    from quantkit.calibration import build_tokens

    ui.stage(f"tokenize {config.name}", config.samples)
    tokens = build_tokens(
        config,
        source.path,
        progress=lambda done, _total: ui.advance(done),
        trust_remote_code=request.trust_remote_code,
    )
    for text in tokens.summary["notes"]:
        ui.note(text)
    return tokens


def _mixture(plan: Plan, tokens: TokenFile | None) -> dict[str, Any] | None:
    if tokens is None or plan.recipe.calibration is None:
        return None
    return {
        "name": plan.recipe.calibration.name,
        "digest": tokens.digest,
        "samples": tokens.samples,
        "sequence_length": tokens.length,
        "tokens": tokens.tokens,
    }


def _job(
    request: Request,
    plan: Plan,
    source: Checkpoint,
    tokens: TokenFile | None,
    note: dict[str, Any],
) -> Job:
    recipe, devices = plan.recipe, resolve_devices(request.device)
    return Job(
        task="quantize",
        backend=plan.backend.name,
        adapter=plan.backend.adapter,
        method=recipe.name,
        model=str(source.path.resolve()),
        out="",
        scheme=recipe.resolved_scheme(),
        kv_cache=recipe.kv_cache,
        layers=dict(plan.layers),
        keep=kept_layers(source, plan),
        options=recipe.options,
        tokens=str(tokens.path) if tokens else None,
        batch_size=recipe.calibration.batch_size if recipe.calibration else 1,
        experts=recipe.experts,
        expert_floor=recipe.expert_floor,
        on_unseen=recipe.on_unseen,
        device=devices[0],
        devices=list(devices),
        placement=plan.placed.placement if plan.placed else "resident",
        seed=recipe.seed,
        shard_size=recipe.shard_bytes(),
        checkpoint_save=str(request.checkpoint_save.resolve()) if request.checkpoint_save else None,
        checkpoint_note=note if request.checkpoint_save else {},
        trust_remote_code=request.trust_remote_code,
    )


def run_logged(job: Job, partial: Path, python: Path, out: Path, ui: Reporter) -> Result:
    """Run the worker; its log ends up in the output, or as `DIR.log` when it failed."""
    log = out.with_name(out.name + ".log")
    placed = replace(job, out=str(partial.resolve()))
    try:
        result = run_worker(placed, python=python, log=log, report=ui)
    except KeyboardInterrupt:
        log.unlink(missing_ok=True)
        raise
    shutil.move(log, partial / LOG)
    return result


def _check_tokens(result: Result, tokens: TokenFile | None) -> None:
    if tokens is None:
        return
    seen = result.calibration.get("digest")
    if seen != tokens.digest:
        raise BackendError(
            f"The tokens that reached the model (digest {str(seen)[:16]}, "
            f"{result.calibration.get('tokens', 0)} tokens) are not those of the calibration "
            f"(digest {tokens.digest[:16]}, {tokens.tokens} tokens).",
            hint="report this: the backend changed or skipped calibration samples",
            code="calibration.digest_mismatch",
        )
