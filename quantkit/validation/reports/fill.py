"""The body of a report: metrics, and what they were derived from."""

from __future__ import annotations

import numpy as np

from quantkit.validation.ask.canary import judge
from quantkit.validation.ask.questions import BaselineAnswers, QuantizedAnswers, Questions
from quantkit.validation.judge.metrics import (
    PerWindow,
    canary_metrics,
    choice_metric,
    routing_by_layer,
    speed_metrics,
    task_metrics,
    text_metrics,
    weight_metrics,
)
from quantkit.validation.reports.report import Both, Report, conversations, kl_histogram
from quantkit.verification import VerifyReport


def fill(
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
