"""The end of every run: seal, verify, provenance, card. Nothing is published before it verified."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.backends.process.job import Reporter, Result
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import GgufFile, gguf_in, open_gguf
from quantkit.checkpoint.provenance import PROVENANCE
from quantkit.checkpoint.sources import remember_source
from quantkit.errors import CheckError
from quantkit.pipeline.card import hub_name, model_card
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.request import Outcome, Request
from quantkit.pipeline.seal import CARD, provenance, seal, write_json
from quantkit.verification import EngineRequest, PlannedLayers, VerifyReport, Written, verify
from quantkit.verification.configuration.completeness import faults


def finish(
    partial: Path,
    request: Request,
    plan: Plan,
    source: Checkpoint,
    fingerprint: str,
    calibration: Mapping[str, Any] | None,
    result: Result,
    ui: Reporter,
    written: Written | None = None,
) -> Outcome:
    """Make what the library wrote into `partial` a checkpoint that stands on its own.

    `fingerprint` is the source's; `written` is what a writer measured in its own pass.
    Raises CheckError when the result does not verify.
    """
    notes = [*plan.notes, *result.notes]
    ui.stage("seal")
    for text in (sealed := seal(partial, source, trust_remote_code=request.trust_remote_code)):
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
        raise _not_verified(report, request.out)
    held = open_gguf(partial) if gguf_in(partial) else open_checkpoint(partial)
    if Path(request.model).expanduser().exists():
        remember_source(source.path, fingerprint)
    base = hub_name(request.model, source)
    document = provenance(
        partial,
        plan,
        source={
            "name": base or source.path.name,
            "fingerprint": fingerprint,
            **_source_faults(report),
        },
        calibration=dict(calibration) if calibration else None,
        result=result,
        digests=dict(written.digests) if written else held.digests(),
        results=_results(plan, source, held, report),
        notes=notes,
    )
    write_json(partial / PROVENANCE, document)
    (partial / CARD).write_text(model_card(plan, source, base, document), encoding="utf-8")
    return Outcome(request.out, plan, report, document)


def _source_faults(report: VerifyReport) -> dict[str, Any]:
    """What the source lacked already, so that a later `verify` of the output alone knows it."""
    found = [{"code": code, "where": where} for code, where in faults(report.findings)]
    return {"faults": found} if found else {}


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
) -> dict[str, Any]:

    # The types of a GGUF file follow the role of each layer, so its bits are measured.
    bits = held.bits_per_weight if isinstance(held, GgufFile) else plan.bits_per_weight
    results: dict[str, Any] = {
        "source_bytes": source.weight_bytes,
        "weight_bytes": held.weight_bytes,
        "bits_per_weight": round(bits, 4),
    }
    measured = [layer for layer in report.layers if layer.sqnr_db is not None]
    if measured:
        worst = min(measured, key=lambda layer: layer.sqnr_db)
        results["weight_sqnr_db"] = {
            "mean": round(sum(layer.sqnr_db for layer in measured) / len(measured), 2),
            "min": round(worst.sqnr_db, 2),
            "worst_layer": worst.module,
        }
    return results
