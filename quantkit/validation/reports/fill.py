"""The body of a report: metrics, and what they were derived from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantkit.validation.ask.canary import judge
from quantkit.validation.ask.exercises import by_kind, solved
from quantkit.validation.ask.questions import BaselineAnswers, QuantizedAnswers, Questions
from quantkit.validation.ask.reference import RoundedAnswers
from quantkit.validation.judge import pictures
from quantkit.validation.judge.bootstrap import missing
from quantkit.validation.judge.metrics import (
    EXERCISES,
    OF_RTN,
    PerWindow,
    cache_metrics,
    canary_metrics,
    choice_metric,
    perplexity,
    recovered,
    reference_metrics,
    routing_by_layer,
    speed_metrics,
    task_metrics,
    text_metrics,
    weight_metrics,
)
from quantkit.validation.judge.pictures import OF_PICTURES, picture_metrics
from quantkit.validation.reports.report import Both, Report, conversations, kl_histogram
from quantkit.verification import VerifyReport


def fill(
    report: Report,
    integrity: VerifyReport,
    questions: Questions,
    theirs: BaselineAnswers,
    ours: QuantizedAnswers,
    rounded: RoundedAnswers | str,
    stops: set[int],
) -> None:
    """Metrics, and what they were derived from; `rounded` is the baseline rounded to nearest, or
    why there is none."""
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
    worked = [
        solved(q.exercises, answers.exercises, q.tokenizer, stops) for answers in (theirs, ours)
    ]
    report.windows = windows
    report.metrics = {
        **text_metrics(windows, ours.text),
        "mcq_drop": choice_metric(theirs.facts, ours.facts),
        EXERCISES: choice_metric(*worked),
        **canary_metrics(their_talk, our_talk, drift),
        **weight_metrics(integrity),
        **speed_metrics(theirs.throughput, ours.throughput),
        **task_metrics(*samples),
    }
    weights = windows
    if ours.cache is not None:
        weights = PerWindow.of(theirs.text, ours.cache.text)
        report.metrics |= cache_metrics(windows, weights, ours.cache.scales)
    if isinstance(rounded, str):
        report.metrics |= dict.fromkeys(OF_RTN, missing(rounded))
    else:
        reference = PerWindow.of(theirs.text, rounded.text)
        report.metrics |= reference_metrics(weights, reference)
        report.reference = described(weights, reference)
        report.notes.append(in_words(report.reference))
    if why := q.pictures.why or (theirs.pictures if isinstance(theirs.pictures, str) else ""):
        report.metrics |= dict.fromkeys(OF_PICTURES, missing(why))
    elif ours.pictures is not None:
        beside = rounded if isinstance(rounded, str) else rounded.pictures
        assert beside is not None
        report.metrics |= picture_metrics(q.pictures, ours.pictures, beside)
        report.images = pictures.described(q.pictures, ours.pictures)
    report.values = {
        "perplexity": Both(perplexity(windows.nll_baseline), perplexity(windows.nll)),
        "mcq_accuracy": Both(float(theirs.facts.mean()), float(ours.facts.mean())),
        "exercises": Both(*(by_kind(q.exercises, right) for right in worked)),
        "tasks": Both(theirs.tasks.get("results", {}), ours.tasks.get("results", {})),
    }
    report.right = Both(theirs.facts, ours.facts)
    report.canary = conversations(their_talk, our_talk)
    report.throughput = Both(theirs.throughput, ours.throughput)
    report.kl_histogram = kl_histogram(ours.text.kl)
    report.routing = routing_by_layer(ours.text)


def described(windows: PerWindow, rounded: PerWindow) -> dict[str, Any]:
    """The baseline rounded to nearest: what it loses, and how much of that the checkpoint does
    not."""
    assert rounded.kl is not None
    return {
        "perplexity": perplexity(rounded.nll),
        "kl_mean": float(rounded.kl.mean()),
        "recovered": recovered(windows, rounded),
    }


def in_words(reference: Mapping[str, Any]) -> str:
    """`described` as a note."""
    words = {"kl": "KL", "perplexity": "perplexity"}
    shares = {w: s for key, w in words.items() if (s := reference["recovered"][key]) is not None}
    told = ", ".join(f"{share:.0%} in {word}" for word, share in shares.items())
    return (
        "rounded to nearest in the same formats the baseline has the perplexity "
        f"{reference['perplexity']:.4g} and the KL {reference['kl_mean']:.3g}; of that loss the "
        f"checkpoint recovers {told or 'nothing: there is none'}"
    )
