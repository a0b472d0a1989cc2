"""`validate`: check, refuse, ask both models the same, hold the gates. The file to read first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from quantkit import __version__
from quantkit.backends.environments.device import devices_named, resolve_devices
from quantkit.backends.process.job import Reporter
from quantkit.calibration.tokenizer import read_tokenizer_info
from quantkit.checkpoint.network.config import stop_tokens
from quantkit.checkpoint.scan import refuse_bad_weights
from quantkit.engines.gpus import gpu_here
from quantkit.engines.online import Online, online_named, refuse_gpu
from quantkit.recipe.gates import parse_gate
from quantkit.validation.ask.answers import AS_TASKED, Answers
from quantkit.validation.ask.cachefile import BaselineCache
from quantkit.validation.ask.canary import canary_prompts
from quantkit.validation.ask.choices import facts
from quantkit.validation.ask.data import eval_text, refuse_seen, seen_by_calibration
from quantkit.validation.ask.exercises import chat_exercises
from quantkit.validation.ask.health import refuse_silent, silence
from quantkit.validation.ask.picture_prompts import picture_prompts
from quantkit.validation.ask.questions import Lazy, Questions, ask_baseline, ask_quantized
from quantkit.validation.ask.reference import ask_reference, unknown
from quantkit.validation.ask.tasks import answered_as, asked_how, choose_tasks
from quantkit.validation.ask.text import BaselineText
from quantkit.validation.forecast import say_how_long
from quantkit.validation.judge.bootstrap import missing
from quantkit.validation.judge.chosen import askable, gates_of, measurable
from quantkit.validation.judge.metrics import EXERCISES, OF_RTN, ROUTING
from quantkit.validation.judge.pictures import OF_PICTURES
from quantkit.validation.judge.regression import compare, no_longer_measured, refuse_incomparable
from quantkit.validation.judge.verdicts import hold
from quantkit.validation.memory import check_memory, explained
from quantkit.validation.online import ask_online
from quantkit.validation.preflight import (
    chat_of,
    check_integrity,
    longest_of,
    open_candidate,
    refuse_missing_rows,
    scan_baseline,
    source_here,
    staged,
    tokenizer_of,
)
from quantkit.validation.reports.earlier import read_report
from quantkit.validation.reports.fill import fill
from quantkit.validation.reports.head import baseline_name, described, first_notes
from quantkit.validation.reports.report import Report
from quantkit.validation.subjects.base import Opening, Subject
from quantkit.validation.subjects.engines import engine_build, opener, refuse_unopenable

FACTS_A_SAMPLE = 12


@dataclass(frozen=True)
class ValidateRequest:
    """What `quantkit validate` was asked for.

    baseline: a directory or Hub name; "": what quantkit.json remembers. data: a text file instead
    of the held-out text. samples: windows of text, with twelve facts each. limit: most samples of
    an lm-eval task; chat, fewshot and answers: how they are asked. as_on: the GPU whose engine
    decides which activations are rounded ("": this).
    against_online: an engine's method that quantizes the baseline as it loads, a third column.
    broken_baseline: measure though the baseline answers nothing.
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
    chat: bool = False
    fewshot: int | None = None
    answers: Answers = AS_TASKED
    gates: tuple[str, ...] = ()
    against: Path | None = None
    against_online: str = ""
    throughput: bool = True
    broken_baseline: bool = False


def validate(request: ValidateRequest, ui: Reporter) -> Report:
    """Measure a checkpoint against its baseline and hold its gates.

    Raises InputError, before any token is generated, for a checkpoint that is broken, a baseline or
    an earlier report that cannot be compared with it, text that calibration saw, and models that
    do not fit into memory, and before the checkpoint is loaded for a baseline that answers nothing;
    BackendError when an engine fails. A failed gate is no exception.
    """
    start = time.monotonic()
    opens = opener(request.engine)
    asked = [parse_gate(text) for text in request.gates]
    earlier = read_report(request.against) if request.against else None
    tasks = choose_tasks(
        request.tasks,
        request.limit,
        chat=request.chat,
        fewshot=request.fewshot,
        answers=request.answers,
    )
    served = "" if request.engine == "builtin" else request.engine
    online = online_named(request.against_online, served) if request.against_online else None
    if online is not None and served:
        refuse_gpu(online, gpu_here())
    here = None if request.baseline else source_here(request.path, ui)
    candidate = open_candidate(request.path, str(here[0]) if here else request.baseline)
    device = devices_named(resolve_devices(request.device))
    refuse_unopenable(request.engine, candidate.baseline.path, Opening(device))
    refuse_unopenable(
        request.engine, candidate.path, Opening(device, request.kernel, request.as_on)
    )
    if online is not None:
        refuse_unopenable(
            request.engine,
            candidate.baseline.path,
            Opening(device, as_on=request.as_on, online=online),
        )
    integrity = check_integrity(candidate, staged(ui, "verify"))
    gates, loosened = gates_of(candidate, integrity, asked)
    gates, unasked = askable(gates, request.engine)
    their_need, our_need = check_memory(candidate, request.kernel, device)
    base = candidate.baseline
    tokenizer, info = tokenizer_of(base.path), read_tokenizer_info(base.path)
    longest = longest_of(candidate)
    if tasks is not None:
        tasks = answered_as(tasks, request.engine, base.path, info.chat_template, longest)
    limits = [most for most in (info.max_length, longest) if most]
    text = eval_text(request.data, tokenizer, request.samples, min(limits, default=None))
    seen = seen_by_calibration(text, candidate.provenance, base.path)
    refuse_seen(text, seen or 0.0)
    scanned = here[1] if here else scan_baseline(base, ui)
    refuse_bad_weights(scanned, base)
    report = Report(
        checkpoint=described(candidate, integrity),
        baseline={
            "name": baseline_name(request.baseline, candidate),
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
        notes=unasked + first_notes(candidate, scanned.fingerprint, seen) + asked_how(tasks),
        warnings=loosened,
    )
    if earlier is not None:
        refuse_incomparable(vars(report), earlier)
    prompts, ids = canary_prompts(base.path, tokenizer, longest)
    asked_facts = facts(FACTS_A_SAMPLE * request.samples)
    said = (word for fact in asked_facts for word in (fact.prompt, *fact.choices))
    texts = (tokenizer.encode(word, True) for word in said)
    exercises, worked = chat_exercises(base.path, tokenizer, request.samples, longest)
    pictures = picture_prompts(candidate, request.engine, tokenizer, request.samples, longest)
    refuse_missing_rows(base, [*text.windows.tolist(), *ids, *worked, *texts])
    questions = Questions(
        tokenizer, text, prompts, ids, asked_facts, exercises, worked, tasks, request.throughput,
        longest, chat_of(info, request.answers.thinking), pictures,
    )  # fmt: skip

    rounding = Opening(device, request.kernel, request.as_on, staged(ui, "load rounded to nearest"))
    told = False

    def opened(
        path: Path, name: str, kernel: str, as_on: str = "", online: Online | None = None
    ) -> Subject:
        nonlocal told
        subject = opens(path, Opening(device, kernel, as_on, staged(ui, f"load {name}"), online))
        if not told:
            told = True
            say_how_long(
                subject,
                questions,
                ui,
                baseline=name == "baseline",
                cached=cache.holds("text", text.digest),
                rounded=unknown(candidate, request.engine, rounding, questions, cache),
            )
        return subject

    def heard(said: BaselineText) -> None:
        sentence = silence(text.windows, said.logprobs)
        if sentence is not None and not request.broken_baseline:
            refuse_silent(sentence, request.path, base.path)
        if sentence is not None:
            report.warnings.append(sentence)

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
            theirs = ask_baseline(baseline, questions, cache, ui, heard)
        finally:
            baseline.close()
    with explained(f"The baseline {base.path}, rounded", their_need):
        rounded = ask_reference(candidate, request.engine, rounding, questions, theirs, cache, ui)
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
    if online is not None:
        with explained(f"The baseline {base.path}", their_need):
            subject = opened(base.path, f"online {online.name}", "auto", request.as_on, online)
            try:
                report.online = ask_online(online, subject, questions, theirs, ours, ui)
            finally:
                subject.close()
    if cache.hits:
        report.notes.append(f"{cache.hits} measurements of the baseline came from the cache")
    stops = set(stop_tokens(base.path, base.config))
    fill(report, integrity, questions, theirs, ours, rounded, stops)
    gates, unseen = measurable(gates, _unmeasured(report))
    report.notes += unseen
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


def _unmeasured(report: Report) -> dict[str, str]:
    """Metric → why this run could not measure it, of those that not every model has."""
    routers = "the choices of this family's routers cannot be seen"
    found = {} if report.routing else {ROUTING: routers}
    asked = [m for m in (*OF_RTN, *OF_PICTURES, EXERCISES) if m in report.metrics]
    return found | {name: m.why for name in asked if (m := report.metrics[name]).value is None}


def _versions() -> tuple[str, ...]:
    return (__version__, *map(version, ("torch", "transformers", "tokenizers")))
