"""`verify`: the checks in order, each on what the ones before it left readable."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import gguf_in
from quantkit.checkpoint.progress import Progress
from quantkit.engines import SILENT_GARBAGE
from quantkit.errors import InputError
from quantkit.formats.quantized import QuantizedCheckpoint, examine
from quantkit.formats.registry import detect, is_quantized
from quantkit.verification.engines import check_engines, check_gguf
from quantkit.verification.findings import (
    EngineRequest,
    Finding,
    PlannedLayers,
    VerifyReport,
    Written,
    error,
    from_exception,
    info,
)
from quantkit.verification.gguf import verify_gguf

if TYPE_CHECKING:
    from quantkit.verification.weights.folds import Folding
    from quantkit.verification.weights.source import SourceModel

_MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, re.error,
)  # fmt: skip
"""What reading settings of the wrong types raises: a config is untrusted input."""


_FOLDING: dict[str, Folding] = {
    "modelopt": "never",
    "gptq": "never",
    "auto-round": "never",
    "awq": "declared",
}
"""Layouts whose methods fold, or do not; the others do not say."""

_MODELOPT_FOLDING = {"W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ"}


def verify(
    path: Path,
    source: Path | None = None,
    plan: PlannedLayers | None = None,
    progress: Progress | None = None,
    written: Written | None = None,
    engines: EngineRequest | None = None,
) -> VerifyReport:
    """Check a finished checkpoint, alone, against its quantkit.json, and against its source.

    `plan` is what the recipe asked for (taken from quantkit.json when absent); `progress` gets
    (layers done, layers in all). With `written`, which needs the source, the tensors' values are
    not read again: their writer measured them. `engines` that will not load the checkpoint are
    errors. Whatever is wrong becomes a finding; only a path
    that does not exist, or a source that cannot be read, raises InputError.
    """
    if gguf_in(path):
        report = verify_gguf(path, source, plan, progress)
        report.findings += check_gguf(engines)
        return report
    start = time.monotonic()
    base = None if source is None else _as_source(open_checkpoint(source))
    report = VerifyReport(path, "unknown", source)
    try:
        checkpoint = open_checkpoint(path)
        report.tensors_checked = len(checkpoint.tensors)
        subject = examine(checkpoint, detect(checkpoint))
    except InputError as problem:
        if problem.code == "checkpoint.missing":
            raise
        report.findings.append(from_exception(problem))
    except _MALFORMED as problem:
        report.findings.append(_malformed(path, problem))
    else:
        _check(report, subject, base, plan, progress, written)
        try:
            report.findings += list(check_engines(subject, engines))
        except _MALFORMED as problem:
            report.findings.append(_malformed(path, problem))
    report.seconds = time.monotonic() - start
    return report


def _malformed(path: Path, problem: Exception) -> Finding:
    return error(
        "format.malformed",
        f"the quantization settings of {path} cannot be understood: {problem!r}",
        "export the checkpoint again; its config was edited or is of an unknown version",
    )


def _check(
    report: VerifyReport,
    subject: QuantizedCheckpoint,
    base: SourceModel | None,
    plan: PlannedLayers | None,
    progress: Progress | None,
    written: Written | None,
) -> None:
    from quantkit.verification.configuration import activations, completeness
    from quantkit.verification.configuration.declared import check_declared
    from quantkit.verification.configuration.planned import check_plan
    from quantkit.verification.configuration.structure import check_structure
    from quantkit.verification.files import digests, sidecars
    from quantkit.verification.weights.kept import check_finite
    from quantkit.verification.weights.written import check_written

    checkpoint, findings = subject.checkpoint, report.findings
    report.format = subject.declaration.quant_method
    report.modules_quantized = len(subject.declaration.layers)
    findings += _check_something_is_quantized(subject)
    declared, broken = check_declared(subject)
    findings += declared
    seal, malformed = digests.read_seal(checkpoint)
    findings += completeness.check_completeness(
        subject, base.checkpoint if base else None, seal.source_faults if seal else ()
    )
    findings += check_structure(subject, broken)
    findings += malformed
    plan = plan or (seal.plan if seal else None)
    if plan is not None:
        findings += check_plan(subject, plan)
    findings += sidecars.check_alone(checkpoint)
    if written is not None and base is not None:
        if not report.errors:  # what is declared wrongly cannot be looked up by layer
            check_written(report, subject, base, written)
    else:
        findings += check_finite(subject)
        findings += activations.check_input_scales(subject, broken)
        findings += activations.check_kv_cache(subject)
        _check_weights(report, subject, broken, base, _folding(subject, plan), progress)
    if base is not None:
        findings += sidecars.check_against(checkpoint, base.checkpoint)
    if seal is not None:
        findings += digests.check_seal(checkpoint, seal)
    findings += _note_engines(subject)


def _check_weights(
    report: VerifyReport,
    subject: QuantizedCheckpoint,
    broken: set[str],
    source: SourceModel | None,
    folding: Folding,
    progress: Progress | None,
) -> None:
    """Layer by layer, and with a source the ledger, the folds and the kept tensors."""
    from quantkit.verification.weights.folds import norm_folds
    from quantkit.verification.weights.kept import settle_altered, usable_folds
    from quantkit.verification.weights.layers import Weights, check_weights, fidelities
    from quantkit.verification.weights.ledger import Ledger, make_ledger
    from quantkit.verification.weights.rotation import RotatedWeights, find_rotation

    modules = [name for name in subject.declaration.layers if name not in broken]
    ledger = Ledger() if source is None else make_ledger(subject, source)
    folds, impossible = (
        ([], []) if folding == "never" else usable_folds(norm_folds(subject, ledger.altered))
    )
    columns = {module: fold.factor for fold in folds for module in fold.consumers}
    if folding != "never":
        altered = {name.rpartition(".")[0] for name in ledger.altered}
        kept = [m.name for m in subject.modules.values() if len(m.shape) == 2]
        rescaled = [m for m in kept if m in columns or (m in altered and m.endswith("_proj"))]
        modules += [m for m in rescaled if m not in subject.declaration.layers]
    weights = Weights(subject, source, ledger, columns)
    turned = None if folding == "never" else find_rotation(subject, ledger.altered)
    if turned is not None:
        rotation, embedding = turned
        ledger.states[ledger.altered.pop(embedding)[1].name] = "folded"
        weights = RotatedWeights(subject, source, ledger, columns, rotation)
    row_folds = folding != "never" and turned is None
    results = check_weights(weights, modules, row_folds=row_folds, progress=progress)
    report.findings += [*ledger.findings, *impossible]
    for module, result in results.items():
        if module in subject.declaration.layers:
            report.findings += [*result.findings, *result.faults]
    report.findings += settle_altered(ledger, folds, results)
    report.layers = fidelities(weights, results)
    report.ledger = Counter(ledger.states.values()) if source else _count_alone(subject)


def _as_source(base: Checkpoint) -> SourceModel:
    """The source; InputError when it is quantized in a way that cannot be compared with."""
    from quantkit.checkpoint.network.fp8_blocks import INVERSE_SCALE
    from quantkit.verification.weights.source import SourceModel

    found = is_quantized(base)
    if found and not any(name.endswith(INVERSE_SCALE) for name in base.tensors):
        raise InputError(
            f"The source {base.path} is quantized itself ({found}).",
            hint="give --source the 16-bit model that this checkpoint was made from",
            code="source.quantized",
        )
    return SourceModel(base)


def _count_alone(subject: QuantizedCheckpoint) -> Counter[str]:
    quantized = len(subject.owned)
    return Counter(quantized=quantized, kept=len(subject.checkpoint.tensors) - quantized)


def _folding(subject: QuantizedCheckpoint, plan: PlannedLayers | None) -> Folding:
    """Whether kept tensors may be rewritten: as the plan says, else as the layout implies."""
    if plan is not None and plan.folds is not None:
        return "declared" if plan.folds else "never"
    packings = {spec.packing for spec in subject.declaration.layers.values()}
    if not packings.isdisjoint(_MODELOPT_FOLDING):
        return "declared"
    return _FOLDING.get(subject.declaration.quant_method, "possible")


def _check_something_is_quantized(subject: QuantizedCheckpoint) -> list[Finding]:
    if subject.declaration.layers:
        return []
    return [
        error(
            "declared.nothing",
            f"the {subject.declaration.quant_method} configuration declares no quantized layer",
            "quantize the model, or remove quantization_config from config.json",
        )
    ]


def _note_engines(subject: QuantizedCheckpoint) -> list[Finding]:
    said = SILENT_GARBAGE.get(subject.declaration.quant_method)
    return [info("engine.transformers_ignores", said, "quantkit launch DIR")] if said else []
