"""`validate`: check, refuse, ask both models the same, hold the gates. The file to read first."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from quantkit import __version__
from quantkit.backends.environments.device import resolve_device
from quantkit.backends.process.job import Reporter
from quantkit.calibration.tokenizer import read_tokenizer_info
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.config import experts_per_token, positions, stop_tokens
from quantkit.checkpoint.progress import Progress
from quantkit.checkpoint.provenance import Provenance
from quantkit.checkpoint.scan import Scan, refuse_bad_weights, scan
from quantkit.recipe.gates import Gate, parse_gate
from quantkit.validation.ask.cachefile import BaselineCache
from quantkit.validation.ask.canary import canary_prompts, judge
from quantkit.validation.ask.choices import facts
from quantkit.validation.ask.data import eval_text, refuse_seen, seen_by_calibration
from quantkit.validation.ask.questions import (
    BaselineAnswers,
    Lazy,
    QuantizedAnswers,
    Questions,
    ask_baseline,
    ask_quantized,
)
from quantkit.validation.ask.tasks import choose_tasks
from quantkit.validation.forecast import forecast, pace, seconds
from quantkit.validation.judge.bootstrap import missing
from quantkit.validation.judge.default_gates import default_gates
from quantkit.validation.judge.metrics import (
    BUILTIN_ONLY,
    ROUTING,
    PerWindow,
    canary_metrics,
    choice_metric,
    routing_by_layer,
    speed_metrics,
    task_metrics,
    text_metrics,
    weight_metrics,
)
from quantkit.validation.judge.regression import compare, no_longer_measured, refuse_incomparable
from quantkit.validation.judge.verdicts import accepted, chosen_gates, hold
from quantkit.validation.memory import explained, needed_bytes, refuse_too_large
from quantkit.validation.preflight import (
    Candidate,
    check_integrity,
    open_candidate,
    refuse_missing_rows,
    source_here,
    tokenizer_of,
)
from quantkit.validation.reports.earlier import read_report
from quantkit.validation.reports.report import (
    Both,
    Report,
    conversations,
    kl_histogram,
    recipe_digest,
)
from quantkit.validation.subjects.base import Opening, Subject
from quantkit.validation.subjects.engines import engine_build, opener, refuse_unopenable
from quantkit.verification import VerifyReport

FACTS_A_SAMPLE = 12


@dataclass(frozen=True)
class ValidateRequest:
    """What `quantkit validate` was asked for.

    baseline: a directory or Hub name; "": what quantkit.json remembers. data: a text file instead
    of the held-out text. samples: windows of text, with twelve facts each. limit: most samples of
    an lm-eval task. as_on: the GPU whose engine decides which activations are rounded ("": this).
    """

    path: Path
    baseline: str = ""
    engine: str = "builtin"
    kernel: str = "auto"
    as_on: str = ""
    device: str = "auto"
    data: Path | None = None
    samples: int = 32
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    gates: tuple[str, ...] = ()
    against: Path | None = None
    throughput: bool = True


def validate(request: ValidateRequest, ui: Reporter) -> Report:
    """Measure a checkpoint against its baseline and hold its gates.

    Raises InputError, before any token is generated, for a checkpoint that is broken, a baseline or
    an earlier report that cannot be compared with it, text that calibration saw, and models that
    do not fit into memory; BackendError when an engine fails. A failed gate is no exception.
    """
    start = time.monotonic()
    opens = opener(request.engine)
    asked = [parse_gate(text) for text in request.gates]
    earlier = read_report(request.against) if request.against else None
    tasks = choose_tasks(request.tasks, request.limit)
    here = None if request.baseline else source_here(request.path, ui)
    candidate = open_candidate(request.path, str(here[0]) if here else request.baseline)
    device = resolve_device(request.device)
    refuse_unopenable(request.engine, candidate.baseline.path, Opening(device))
    refuse_unopenable(
        request.engine, candidate.path, Opening(device, request.kernel, request.as_on)
    )
    integrity = check_integrity(candidate, staged(ui, "verify"))
    gates, loosened = _gates(candidate, integrity, asked)
    gates, unasked = _askable(gates, request.engine)
    their_need, our_need = _check_memory(candidate, request.kernel, device)
    base = candidate.baseline
    tokenizer, info = tokenizer_of(base.path), read_tokenizer_info(base.path)
    longest = _longest(candidate)
    limits = [most for most in (info.max_length, longest) if most]
    text = eval_text(request.data, tokenizer, request.samples, min(limits, default=None))
    seen = seen_by_calibration(text, candidate.provenance, base.path)
    refuse_seen(text, seen or 0.0)
    scanned = here[1] if here else _scanned(base, ui)
    refuse_bad_weights(scanned, base)
    report = Report(
        checkpoint=_describe(candidate, integrity),
        baseline={
            "name": _name(request.baseline, candidate),
            "fingerprint": scanned.fingerprint,
            "weight_bytes": base.weight_bytes,
        },
        engine={"name": request.engine, "kernel": request.kernel, "device": device},
        text={
            "name": text.name,
            "digest": text.digest,
            "windows": len(text.windows),
            "length": text.windows.shape[1],
            "seen_by_calibration": seen,
        },
        layers=integrity.layers,
        notes=unasked + _notes(candidate, scanned.fingerprint, seen),
        warnings=loosened,
    )
    if earlier is not None:
        refuse_incomparable(vars(report), earlier)
    prompts, ids = canary_prompts(base.path, tokenizer, longest)
    asked_facts = facts(FACTS_A_SAMPLE * request.samples)
    said = (word for fact in asked_facts for word in (fact.prompt, *fact.choices))
    texts = (tokenizer.encode(word, True) for word in said)
    refuse_missing_rows(base, [*text.windows.tolist(), *ids, *texts])
    questions = Questions(
        tokenizer, text, prompts, ids, asked_facts, tasks, request.throughput, longest
    )

    told = False

    def opened(path: Path, name: str, kernel: str, as_on: str = "") -> Subject:
        nonlocal told
        subject = opens(path, Opening(device, kernel, as_on, staged(ui, f"load {name}")))
        if not told:
            told = True
            cached = cache.holds("text", text.digest)
            _say_how_long(subject, questions, name == "baseline", cached, ui)
        return subject

    baseline = Lazy(lambda: opened(base.path, "baseline", "auto"))
    cache = BaselineCache(
        scanned.fingerprint,
        info.digest,
        request.engine,
        engine_build(request.engine),
        device,
        *_versions(),
    )
    with explained(f"The baseline {base.path}", their_need):
        try:
            theirs = ask_baseline(baseline, questions, cache, ui)
        finally:
            baseline.close()
    with explained(str(candidate.path), our_need):
        subject = opened(candidate.path, "quantized", request.kernel, request.as_on)
        try:
            report.engine |= {
                "version": subject.version,
                "kernels": subject.kernels(),
                "weights_only": subject.weights_only,
            }
            report.notes += subject.notes
            ours = ask_quantized(subject, questions, theirs, ui)
        finally:
            subject.close()
    if cache.hits:
        report.notes.append(f"{cache.hits} measurements of the baseline came from the cache")
    _fill(report, integrity, questions, theirs, ours, set(stop_tokens(base.path, base.config)))
    gates = _measurable(gates, report)
    absent = missing("this run did not measure it")
    report.gates = [
        hold(
            gate,
            report.metrics.get(gate.metric, absent),
            weights_only=report.engine["weights_only"],
        )
        for gate in gates
    ]
    report.seconds = time.monotonic() - start
    if earlier is not None:
        report.changes = compare(report.metrics, report.to_json(), earlier)
        if gone := no_longer_measured(report.metrics, earlier):
            report.warnings.append(
                f"the earlier report has {', '.join(gone)}, which this run did not measure"
            )
    return report


def _say_how_long(
    subject: Subject, questions: Questions, baseline: bool, cached: bool, ui: Reporter
) -> None:
    ui.stage("estimate the time")
    try:
        parts = seconds(pace(subject, questions), questions)
    except BaseException:
        subject.close()
        raise
    tasks = questions.tasks is not None
    ui.note(forecast(parts, baseline=baseline, cached=cached, tasks=tasks))


def staged(ui: Reporter, name: str) -> Progress:
    """A progress callback that begins its stage when it first hears of the total."""
    begun = False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            ui.stage(name, total)
            begun = True
        ui.advance(done)

    return advance


def _fill(
    report: Report,
    integrity: VerifyReport,
    questions: Questions,
    theirs: BaselineAnswers,
    ours: QuantizedAnswers,
    stops: set[int],
) -> None:
    """Metrics, and what they were derived from."""
    q, windows = questions, PerWindow.of(theirs.text, ours.text)
    their_talk, our_talk = (
        judge(q.canary, answers.canary, q.tokenizer, stops) for answers in (theirs, ours)
    )
    drift = [
        before - now
        for before, now in zip(theirs.canary_logprobs, ours.canary_logprobs, strict=True)
    ]
    samples = [
        {name: np.array(values) for name, values in answers.tasks.get("samples", {}).items()}
        for answers in (theirs, ours)
    ]
    report.windows = windows
    report.metrics = {
        **text_metrics(windows, ours.text.kl),
        "mcq_drop": choice_metric(theirs.facts, ours.facts),
        **canary_metrics(their_talk, our_talk, drift),
        **weight_metrics(integrity),
        **speed_metrics(theirs.throughput, ours.throughput),
        **task_metrics(*samples),
    }
    report.values = {
        "perplexity": Both(
            float(np.exp(windows.nll_baseline.mean())), float(np.exp(windows.nll.mean()))
        ),
        "mcq_accuracy": Both(float(theirs.facts.mean()), float(ours.facts.mean())),
        "tasks": Both(theirs.tasks.get("results", {}), ours.tasks.get("results", {})),
    }
    report.right = Both(theirs.facts, ours.facts)
    report.canary = conversations(their_talk, our_talk)
    report.throughput = Both(theirs.throughput, ours.throughput)
    report.kl_histogram = kl_histogram(ours.text.kl)
    report.routing = routing_by_layer(ours.text)


def _gates(
    candidate: Candidate, integrity: VerifyReport, asked: list[Gate]
) -> tuple[list[Gate], list[str]]:
    """The scheme's gates, the recipe's and the command's (of a metric the last one counts), and
    warnings of what the recipe loosens."""
    recipe_gates = candidate.provenance.gates if candidate.provenance else ()
    chosen = experts_per_token(candidate.baseline.config)
    defaults = default_gates({layer.scheme for layer in integrity.layers}, chosen)
    stated = [parse_gate(text, "recipe") for text in recipe_gates]
    counted, warnings = accepted(stated, defaults)
    return chosen_gates(defaults, counted, asked), warnings


def _askable(gates: list[Gate], engine: str) -> tuple[list[Gate], list[str]]:
    """Without the default gates that only logits could tell, where the engine gives none."""
    if engine == "builtin":
        return gates, []
    out = [g for g in gates if g.source == "default" and g.metric in BUILTIN_ONLY]
    what = {ROUTING: "does not show its routers"}
    notes = [
        f"{gate.metric} is not gated: {engine} {what.get(gate.metric, 'gives no logits')}"
        for gate in out
    ]
    return [gate for gate in gates if gate not in out], notes


def _measurable(gates: list[Gate], report: Report) -> list[Gate]:
    """Without the default gate of a mixture whose routers cannot be seen, which is noted."""
    if report.routing:
        return gates
    out = [g for g in gates if g.source == "default" and g.metric == ROUTING]
    report.notes += [
        f"{gate.metric} is not gated: the choices of this family's routers cannot be seen"
        for gate in out
    ]
    return [gate for gate in gates if gate not in out]


def _longest(candidate: Candidate) -> int | None:
    """The positions that both networks have; None where neither config states them."""
    held = candidate.held.config if isinstance(candidate.held, Checkpoint) else {}
    found = [most for config in (held, candidate.baseline.config) if (most := positions(config))]
    return min(found, default=None)


def _check_memory(candidate: Candidate, kernel: str, device: str) -> tuple[int, int]:
    """Bytes that the baseline and the checkpoint need, one after the other; refused if too many."""
    base = candidate.baseline
    needs = (
        needed_bytes(base, expanded=False),
        needed_bytes(candidate.held, expanded=kernel == "dequantized"),
    )
    refuse_too_large(f"The baseline {base.path}", needs[0], device)
    refuse_too_large(str(candidate.path), needs[1], device)
    return needs


def _describe(candidate: Candidate, integrity: VerifyReport) -> dict[str, Any]:
    provenance = candidate.provenance or Provenance()
    return {
        "name": candidate.path.resolve().name,
        "method": provenance.method,
        "recipe_digest": recipe_digest(provenance.recipe),
        "layout": integrity.format,
        "schemes": dict(Counter(layer.scheme for layer in integrity.layers)),
        "weight_bytes": candidate.held.weight_bytes,
        **({"experts": asdict(provenance.experts)} if provenance.experts else {}),
    }


def _scanned(base: Checkpoint, ui: Reporter) -> Scan:
    ui.stage("scan baseline", base.weight_bytes, "bytes")
    return scan(base, ui.advance)


def _name(asked: str, candidate: Candidate) -> str:
    """The baseline as it, or else quantkit.json, names it, a directory by its last part: reports
    are published."""
    named = asked or candidate.source.name
    base = candidate.baseline
    return base.path.resolve().name if Path(named).expanduser().exists() else named


def _notes(candidate: Candidate, fingerprint: str, seen: float | None) -> list[str]:
    notes = []
    if candidate.provenance is not None and candidate.source.fingerprint != fingerprint:
        notes.append("the baseline is not the model that this checkpoint was made from")
    if seen is None:
        notes.append("whether calibration saw the text is unknown: its tokens are not at hand")
    return notes


def _versions() -> tuple[str, ...]:
    return (__version__, *map(version, ("torch", "transformers", "tokenizers")))
