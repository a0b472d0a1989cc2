"""The way of a library's backend: scan, tokens, the worker, what it left."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.backends.environments import find_interpreter, library_versions
from quantkit.backends.environments.device import resolve_devices
from quantkit.backends.process.job import NO_DATA, Job, Reporter, Result
from quantkit.backends.process.parent import run_worker
from quantkit.backends.process.worker import LIBRARIES
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.provenance import LOG, Calibration
from quantkit.checkpoint.scan import Scan, refuse_bad_weights, scan
from quantkit.errors import BackendError, CheckError, InputError
from quantkit.pipeline.calibration_data import mixture_asked, refuse_pictures
from quantkit.pipeline.finish import finish
from quantkit.pipeline.followed import as_written, without
from quantkit.pipeline.plan import Plan, kept_layers
from quantkit.pipeline.publish import check_space, check_target, staged
from quantkit.pipeline.request import Outcome, Request
from quantkit.pipeline.unfinished import Unfinished

if TYPE_CHECKING:
    from quantkit.calibration import TokenFile


def check(source: Checkpoint, plan: Plan) -> None:
    """Raise InputError for a calibration that does not exist, whose data file is missing, or that
    has pictures which the model or the library does not take."""
    config = mixture_asked(plan)
    if config is not None:
        refuse_pictures(config, source, plan)


def run(request: Request, source: Checkpoint, plan: Plan, ui: Reporter) -> Outcome:
    """Calibrate and quantize in the worker, then seal, verify and publish.

    What the worker finished stays in `DIR.partial` when the run stops before the output is
    complete; `request.resume` goes on from it (`unfinished`).
    Raises InputError for what is wrong with the request, the weights or the run to go on with,
    BackendError when the library or its process failed, CheckError when the result did not verify.
    """
    _refuse_stream_flags(request, plan)
    _refuse_full_disk(request, plan)
    python = find_interpreter(plan.backend, request.python or request.recipe.python)
    with staged(
        request.out, overwrite=request.overwrite, resumable=True, resume=request.resume
    ) as partial:
        ui.stage("scan source", source.weight_bytes, "bytes")
        found = scan(source, ui.advance)
        refuse_bad_weights(found, source)
        tokens = _tokens(request, plan, source, ui)
        mixture = _mixture(plan, tokens)
        note = _state_note(request, plan, source, found, mixture)
        job = _job(request, plan, source, tokens, note)
        state = Unfinished(partial)
        goes_on = state.open(_key(job, plan, found, tokens, python), resume=request.resume)
        if state.move(f"{job.placement} on {','.join(job.devices)}"):
            ui.note("the weights lie elsewhere than before: no finished layer is gone on with")
        with _kept_if_worth(state):
            if request.checkpoint_save:
                _check_state_file(
                    request.checkpoint_save, request.overwrite or goes_on, source, plan
                )
            result = _library_stage(
                state, job, python, request.out, ui, _worker(request, plan, state)
            )
            state.place()
            result.notes += tokens.summary["notes"] if tokens else []
            plan = as_written(without(plan, source, result.kept), partial)
            used = result.calibration != NO_DATA
            if used:
                _check_tokens(result, tokens)
            seen = {**result.calibration, **mixture} if mixture and used else {}
            outcome = finish(
                partial,
                request.out,
                request.model,
                plan,
                source,
                found.fingerprint,
                Calibration.of(seen),
                result,
                ui,
                trust_remote_code=request.trust_remote_code,
            )
            state.clear()
            return outcome


def _key(
    job: Job, plan: Plan, found: Scan, tokens: TokenFile | None, python: Path
) -> dict[str, Any]:
    """What decides the library's output, by the user's words for it: not where weights lie, nor
    which of the devices of one kind works."""
    return {
        "recipe": plan.recipe.model_dump(mode="json", exclude={"placement"}),
        "source": {"fingerprint": found.fingerprint},
        "calibration": {"digest": tokens.digest if tokens else None},
        "versions": {"quantkit": __version__, **library_versions(python, LIBRARIES)},
        "device": job.device.partition(":")[0],
        "checkpoint-save": job.checkpoint_save,
    }


@contextmanager
def _kept_if_worth(state: Unfinished) -> Iterator[None]:
    """Keep for a later `--resume` what saves it work; bytes that do not verify never will."""
    try:
        yield
    except BaseException as error:
        state.leave(keep=state.worth_keeping() and not isinstance(error, CheckError))
        raise


def _worker(request: Request, plan: Plan, state: Unfinished) -> Callable[..., Result]:
    """What runs the job: a child of this process, or a node of a cluster."""
    if request.executor == "local":
        return run_worker
    from quantkit.backends.process.on_ray import run_on_node

    memory = plan.placed.need.host if plan.placed else 0
    return functools.partial(run_on_node, memory=memory, again=state.begin)


def _library_stage(
    state: Unfinished,
    job: Job,
    python: Path,
    out: Path,
    ui: Reporter,
    worker: Callable[..., Result],
) -> Result:
    """The worker's output in `state.library`: from the run before where it is whole, else now."""
    result = state.finished()
    if result is not None and (not job.checkpoint_save or Path(job.checkpoint_save).is_file()):
        ui.note("resumed after the library's finished stage")
        return result
    state.begin()
    job = replace(job, resume_folder=str(state.layers.resolve()))
    folder = state.folder.resolve()
    result = run_logged(job, state.library, python, out, ui, folder, worker=worker)
    state.finish(result)
    return result


def _refuse_full_disk(request: Request, plan: Plan) -> None:
    """InputError where the output, and what the library writes beside it, have no space; what a
    stopped run left is there already."""
    beside = plan.placed.disk if plan.placed else 0
    what = "the checkpoint, offloaded weights and finished layers" if beside else "the checkpoint"
    left = request.out.with_name(request.out.name + ".partial").rglob("*") if request.resume else ()
    there = sum(path.stat().st_size for path in left if path.is_file())
    check_space(request.out, plan.estimate.disk + beside - there, what)


def _refuse_stream_flags(request: Request, plan: Plan) -> None:
    asked = {
        "--memory": request.memory is not None,
        "--jobs": request.jobs is not None,
    }
    flags = [flag for flag, given in asked.items() if given]
    if flags:
        raise InputError(
            f"{', '.join(flags)} is for the built-in rtn_* methods: {plan.backend.distribution} "
            "does its work in one process of its own.",
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
    config = mixture_asked(plan)
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
    placement = plan.placed.placement if plan.placed else "resident"
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
        placement=placement,
        ranks=plan.backend.ranks and placement == "spread",
        seed=recipe.seed,
        shard_size=recipe.shard_bytes(),
        checkpoint_save=str(request.checkpoint_save.resolve()) if request.checkpoint_save else None,
        checkpoint_note=note if request.checkpoint_save else {},
        trust_remote_code=request.trust_remote_code,
    )


def run_logged(
    job: Job,
    partial: Path,
    python: Path,
    out: Path,
    ui: Reporter,
    work: Path | None = None,
    *,
    worker: Callable[..., Result] = run_worker,
) -> Result:
    """Run the worker; its log ends up in the output, or beside it when it failed (`_new_log`)."""
    log = _new_log(out)
    placed = replace(job, out=str(partial.resolve()))
    try:
        result = worker(placed, python=python, log=log, report=ui, work=work)
    except KeyboardInterrupt:
        log.unlink(missing_ok=True)
        raise
    shutil.move(log, partial / LOG)
    return result


def _new_log(out: Path) -> Path:
    """`DIR.log` with a first line that says whose it is; where a file of that name is not the log
    of an earlier run, `DIR.2.log` and so on."""
    first = f"The log of quantkit's worker for {out.name}\n"
    for number in count(1):
        log = out.with_name(f"{out.name}.log" if number == 1 else f"{out.name}.{number}.log")
        if log.is_file():
            with log.open("rb") as handle:
                ours = handle.readline() == first.encode()
        else:
            ours = not log.is_symlink() and not log.exists()
        if ours:
            log.write_text(first, encoding="utf-8")
            return log
    raise AssertionError


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
