"""A finished checkpoint as the engines will see it: findings of codes `engine.*`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantkit.engines import EngineRules, Loadable, Verdict, engines, gpu_named, judge
from quantkit.formats.loadable import candidate
from quantkit.formats.quantized import QuantizedCheckpoint
from quantkit.verification.findings import EngineRequest, Finding, error, info, warning

_TRY = "load it once with the engine and compare: quantkit validate --engine"


def check_gguf(asked: EngineRequest | None) -> Iterator[Finding]:
    """Errors for engines that were asked for and read no GGUF file."""
    for verdict in judge(Loadable({}, "gguf", {}, {}), asked.engines, (1,)) if asked else ():
        yield from _findings(verdict, error)


def check_engines(subject: QuantizedCheckpoint, asked: EngineRequest | None) -> Iterator[Finding]:
    """Errors for engines that were asked for and will not load the checkpoint.

    Where none was asked for: warnings for those that read its layout and schemes and will not load
    this checkpoint all the same, and a word on those that do not read them. Where an engine's data
    has no rules for the model: a warning if it was asked for, else a word.
    """
    if not subject.declaration.layers:
        return
    this = candidate(subject)
    gpu = gpu_named(asked.gpu) if asked and asked.gpu else None
    names = asked.engines if asked else tuple(engines())
    # A draft layer so declared stops the engine only once it is asked to speculate with it.
    stranded = any(map(subject.is_float, subject.declaration.layers))
    for verdict in judge(this, names, asked.sizes if asked else (1,), gpu):
        told = asked is not None or (not verdict.refuses or _reads(engines()[verdict.engine], this))
        for caution in verdict.cautions if told else ():
            yield warning(caution.code, caution.text, caution.fix, caution.where or None)
        for note in verdict.notes if told else ():
            yield info("engine.note", note, "")
        if verdict.outcome == "unknown":
            severity = warning if asked else info
            yield severity("engine.unknown", f"{verdict.title}: {verdict.unknown}", _TRY)
        elif verdict.loads:
            if asked and not stranded:
                yield info("engine.loads", f"{verdict.title} (rules of {verdict.version})", "")
        elif asked:
            yield from _findings(verdict, error)
        elif _reads(engines()[verdict.engine], this):
            yield from _findings(verdict, warning)
        else:
            reason = verdict.reasons[0]
            yield info("engine.not_read", f"{verdict.title}: {reason.message}", reason.fix)


def _findings(verdict: Verdict, severity: Any) -> Iterator[Finding]:
    for reason in verdict.reasons:
        yield severity(
            reason.code, f"{verdict.title}: {reason.text}", reason.fix, reason.where or None
        )


def _reads(engine: EngineRules, this: Loadable) -> bool:
    """Whether the engine has a rule for every scheme of the checkpoint."""
    rule = engine.formats.get(this.layout)
    return rule is not None and all(
        part.rule_name(this.layout) in rule.schemes
        for part in this.parts.values()
        if part.scheme is not None
    )
