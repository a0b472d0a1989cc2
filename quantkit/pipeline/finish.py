"""The end of every run: seal, verify, provenance, card. Nothing is published before it verified."""

from __future__ import annotations

from pathlib import Path

from quantkit import __version__
from quantkit.backends.process.job import Reporter, Result
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import GgufFile, gguf_in, open_gguf
from quantkit.checkpoint.provenance import (
    CARD,
    SCHEMA_VERSION,
    Calibration,
    ExpertCoverage,
    Layers,
    Provenance,
    Results,
    Source,
    Stage,
    WeightSqnr,
    write,
)
from quantkit.checkpoint.source_record import remember_source
from quantkit.errors import CheckError
from quantkit.pipeline.card import hub_name, model_card
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.request import Outcome
from quantkit.pipeline.seal import file_digests, seal
from quantkit.verification import EngineRequest, PlannedLayers, VerifyReport, Written, verify
from quantkit.verification.configuration.completeness import faults


def finish(
    partial: Path,
    out: Path,
    model: str,
    plan: Plan,
    source: Checkpoint,
    fingerprint: str,
    calibration: Calibration | None,
    result: Result,
    ui: Reporter,
    written: Written | None = None,
    *,
    trust_remote_code: bool,
) -> Outcome:
    """Make what the library wrote into `partial` a checkpoint that stands on its own.

    `out` is where it will be published, `model` the source as it was asked for; `fingerprint` is
    the source's; `written` is what a writer measured in its own pass.
    Raises CheckError when the result does not verify.
    """
    notes = [*plan.notes, *result.notes]
    ui.stage("seal")
    for text in (sealed := seal(partial, source, trust_remote_code=trust_remote_code)):
        ui.note(text)
    notes += sealed
    ui.stage("verify", len(plan.layers))
    report = verify(
        partial,
        source.path,
        plan=PlannedLayers(
            quantized=plan.layers,
            kept=plan.kept.keys(),
            folds=plan.method.folding != "none",
        ),
        progress=lambda done, _total: ui.advance(done),
        written=written,
        engines=_asked(plan),
    )
    if not report.ok:
        raise _not_verified(report, out)
    held = open_gguf(partial) if gguf_in(partial) else open_checkpoint(partial)
    if Path(model).expanduser().exists():
        remember_source(source.path, fingerprint)
    base = hub_name(model, source)
    made = Provenance(
        schema_version=SCHEMA_VERSION,
        quantkit_version=__version__,
        method=plan.recipe.name,
        recipe=plan.recipe.model_dump(mode="json"),
        # What the source lacked already, so that a later `verify` of the output alone knows it.
        source=Source(base or source.path.name, fingerprint, tuple(faults(report.findings))),
        versions=result.versions,
        compute=result.compute,
        placement=plan.placed.to_json() if plan.placed else None,
        seed=plan.recipe.seed,
        calibration=calibration,
        experts=ExpertCoverage(**result.experts) if result.experts else None,
        plan=Layers({name: scheme.name for name, scheme in plan.layers.items()}, dict(plan.kept)),
        folds=result.folds,
        stages=tuple(Stage(**stage) for stage in result.stages),
        peak_rss_bytes=result.peak_rss_bytes,
        notes=tuple(notes),
        results=_results(plan, source, held, report),
        tensors=dict(written.digests) if written else held.digests(),
        files=file_digests(partial),
    )
    write(partial, made)
    (partial / CARD).write_text(model_card(plan, source, base, made), encoding="utf-8")
    return Outcome(out, plan, report, made)


def _asked(plan: Plan) -> EngineRequest | None:
    serve = plan.recipe.serve
    if not serve.engines:
        return None
    return EngineRequest(tuple(serve.engines), tuple(serve.tp), serve.gpu)


def _not_verified(report: VerifyReport, out: Path) -> CheckError:
    """The error for a result that failed its verification; nothing was published."""
    errors = [finding for finding in report.findings if finding.severity == "error"]
    first = errors[0]
    more = f" ({len(errors) - 1} more errors)" if len(errors) > 1 else ""
    return CheckError(
        f"The new checkpoint did not verify and was not published as {out}: {first.message}{more}",
        hint=first.hint,
        code=first.code,
    )


def _results(
    plan: Plan, source: Checkpoint, held: Checkpoint | GgufFile, report: VerifyReport
) -> Results:
    # The types of a GGUF file follow the role of each layer, so its bits are measured.
    bits = held.bits_per_weight if isinstance(held, GgufFile) else plan.bits_per_weight
    return Results(
        source_bytes=source.weight_bytes,
        weight_bytes=held.weight_bytes,
        bits_per_weight=round(bits, 4),
        weight_sqnr_db=_weight_sqnr(report),
    )


def _weight_sqnr(report: VerifyReport) -> WeightSqnr | None:
    measured = [layer for layer in report.layers if layer.sqnr_db is not None]
    if not measured:
        return None
    worst = min(measured, key=lambda layer: layer.sqnr_db)
    return WeightSqnr(
        mean=round(sum(layer.sqnr_db for layer in measured) / len(measured), 2),
        min=round(worst.sqnr_db, 2),
        worst_layer=worst.module,
    )
