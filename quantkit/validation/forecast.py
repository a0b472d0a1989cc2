"""How long a validation will take: one window and a few new tokens, timed, times what is asked.

A rule of thumb, said before the long work: steps are taken to cost the same at every batch size,
and both models to be equally fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

from quantkit.backends.process.job import Reporter
from quantkit.recipe.units import duration
from quantkit.validation.ask import text
from quantkit.validation.ask.canary import answer_tokens
from quantkit.validation.ask.exercises import NEW_TOKENS as WORKED_TOKENS
from quantkit.validation.ask.questions import Questions
from quantkit.validation.subjects.base import Subject
from quantkit.validation.subjects.throughput import (
    BATCHES,
    NEW_TOKENS,
    PROMPT_TOKENS,
    REPEATS,
    fitting,
)

STEPS = 4


@dataclass(frozen=True)
class Pace:
    """Seconds a token of text that is read, and a step of generation."""

    token: float
    step: float


def pace(subject: Subject, questions: Questions) -> Pace:
    """Measure a loaded model on the first window and the canary's prompts."""
    window = questions.text.windows[:1]
    start = perf_counter()
    text.measure_baseline(subject, window, None)
    token = (perf_counter() - start) / window.size
    steps = min(STEPS, answer_tokens(questions.prompts, questions.longest))
    start = perf_counter()
    subject.generate(questions.prompts, steps)
    rest = perf_counter() - start - token * sum(map(len, questions.prompts))
    return Pace(token, max(rest, 0.0) / steps)


def seconds(pace: Pace, questions: Questions) -> dict[str, float]:
    """Part → seconds that one model takes for it; lm-eval tasks are not known beforehand."""
    q = questions
    most = answer_tokens(q.prompts, q.longest)
    said = sum(map(len, q.prompts)) * 2 + most * len(q.prompts)  # answered, then scored
    lengths = (len(q.tokenizer.encode(f.prompt, True)) * len(f.choices) for f in q.facts)
    parts = {
        "text": pace.token * q.text.windows.size,
        "canary": pace.token * said + pace.step * most,
        "facts": pace.token * sum(lengths),
    }
    if q.exercises:
        worked = sum(map(len, q.exercise_prompts))
        parts["exercises"] = pace.token * worked + pace.step * WORKED_TOKENS
    if q.pictures.prompts:
        parts["pictures"] = pace.token * sum(len(one.ids) for one in q.pictures.prompts)
    if q.throughput:
        prompt, new = fitting(PROMPT_TOKENS, NEW_TOKENS, q.longest)
        once = sum(pace.token * prompt * batch + pace.step * new for batch in BATCHES)
        parts["throughput"] = once * (REPEATS + 1)
    return parts


def forecast(
    parts: Mapping[str, float], *, baseline: bool, cached: bool, rounded: bool, tasks: bool
) -> str:
    """The sentence for `parts` of one model: twice with the baseline, of which a cache that holds
    its answers leaves the throughput alone; the text once more where the baseline is `rounded`."""
    twice = {"throughput"} if cached else parts.keys()
    whole = {p: s * (2 if baseline and p in twice else 1) for p, s in parts.items()}
    whole |= {"rounded to nearest": parts["text"]} if rounded else {}
    longest = max(whole, key=lambda part: whole[part])
    told = ", ".join(
        f"{part} {duration(s)}{' (the longest)' if part == longest else ''}"
        for part, s in whole.items()
    )
    more = ", and the lm-eval tasks" if tasks else ""
    return f"this will take about {duration(sum(whole.values()))}{more}: {told}"


def say_how_long(
    subject: Subject,
    questions: Questions,
    ui: Reporter,
    *,
    baseline: bool,
    cached: bool,
    rounded: bool,
) -> None:
    """Note the forecast; closes the subject when timing it fails."""
    ui.stage("estimate the time")
    try:
        parts = seconds(pace(subject, questions), questions)
    except BaseException:
        subject.close()
        raise
    tasks = questions.tasks is not None
    ui.note(forecast(parts, baseline=baseline, cached=cached, rounded=rounded, tasks=tasks))
