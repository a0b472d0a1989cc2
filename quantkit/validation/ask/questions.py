"""Everything that is asked of one model, in the same order for the baseline and the quantized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.backends.process.job import Reporter
from quantkit.calibration.chat import Render
from quantkit.calibration.tokenizer import Tokenizer
from quantkit.checkpoint.progress import Progress
from quantkit.validation.ask import pictures
from quantkit.validation.ask import text as texts
from quantkit.validation.ask.cachefile import BaselineCache
from quantkit.validation.ask.canary import answer, answer_logprobs, answer_tokens
from quantkit.validation.ask.choices import Question, choice_logprobs, right
from quantkit.validation.ask.data import EvalText
from quantkit.validation.ask.exercises import NEW_TOKENS as WORKED_TOKENS
from quantkit.validation.ask.exercises import Exercise
from quantkit.validation.ask.kvcache import CacheAnswers, ask_cache
from quantkit.validation.ask.picture_prompts import NONE, PicturePrompts
from quantkit.validation.ask.pictures import BaselinePictures, PictureAnswers, ask_pictures
from quantkit.validation.ask.tasks import TaskChoice, run_tasks
from quantkit.validation.ask.text import BaselineText, QuantizedText
from quantkit.validation.subjects.base import Subject, Throughput


@dataclass(frozen=True)
class Questions:
    """What both models are asked: the text, the canary's prompts, the facts, exercises with their
    prompts (none of models that do not chat), tasks, speed, and pictures.

    `longest` are the networks' positions, None where they have no limit; `render` is the chat
    template, where the model has one.
    """

    tokenizer: Tokenizer
    text: EvalText
    canary: tuple[str, ...]
    prompts: list[list[int]]
    facts: list[Question]
    exercises: list[Exercise]
    exercise_prompts: list[list[int]]
    tasks: TaskChoice | None
    throughput: bool
    longest: int | None = None
    render: Render | None = None
    pictures: PicturePrompts = NONE


@dataclass(frozen=True)
class BaselineAnswers:
    """What the baseline said; `canary_logprobs` is its mean log-probability of each own answer,
    `pictures` are in words why it cannot look at them."""

    text: BaselineText
    canary: list[list[int]]
    canary_logprobs: list[float]
    facts: NDArray[np.bool_]
    exercises: list[list[int]]
    tasks: dict[str, Any]
    throughput: Throughput | None
    pictures: BaselinePictures | str | None = None


@dataclass(frozen=True)
class QuantizedAnswers:
    """What the quantized model said; `canary_logprobs` are of the baseline's answers, `cache` is
    the arm with its key-value cache in 16 bit, where it is quantized."""

    text: QuantizedText
    canary: list[list[int]]
    canary_logprobs: list[float]
    facts: NDArray[np.bool_]
    exercises: list[list[int]]
    tasks: dict[str, Any]
    throughput: Throughput | None
    cache: CacheAnswers | None = None
    pictures: PictureAnswers | None = None


class Lazy:
    """A subject that is opened when it is first needed, so that a cached baseline is not loaded."""

    def __init__(self, opens: Callable[[], Subject]) -> None:
        self._opens = opens

    @cached_property
    def subject(self) -> Subject:
        return self._opens()

    def close(self) -> None:
        if "subject" in self.__dict__:
            self.subject.close()
            del self.subject


def ask_baseline(
    baseline: Lazy,
    questions: Questions,
    cache: BaselineCache,
    ui: Reporter,
    heard: Callable[[BaselineText], None],
) -> BaselineAnswers:
    """All answers of the baseline, from the cache where it holds them; throughput never is.

    `heard` is told what it says of the text before anything else is asked.
    """

    def staged(name: str, total: int, make: Callable[[Subject], Any]) -> Callable[[], Any]:
        def run() -> Any:
            subject = baseline.subject
            ui.stage(f"baseline: {name}", total)
            return make(subject)

        return run

    q, windows = questions, questions.text.windows
    found = cache.arrays(
        "text",
        q.text.digest,
        staged(
            "text", len(windows), lambda s: _arrays(texts.measure_baseline(s, windows, _on(ui)))
        ),
    )
    text = BaselineText(**found)
    heard(text)
    most = answer_tokens(q.prompts, q.longest)
    prompts = _digest(q.prompts, most)
    said = cache.value(
        "canary",
        prompts,
        staged("canary", len(q.prompts), lambda s: answer(s, q.prompts, most, _on(ui))),
    )
    likely = cache.value(
        "drift", prompts, staged("canary", 0, lambda s: answer_logprobs(s, q.prompts, said))
    )
    facts = cache.arrays(
        "facts",
        _digest([[f.prompt, *f.choices] for f in q.facts]),
        staged("facts", 4 * len(q.facts), lambda s: {"logprobs": _facts(s, q, ui)}),
    )
    worked: list[list[int]] = []
    if q.exercises:
        asked = q.exercise_prompts
        make = staged("exercises", len(asked), lambda s: answer(s, asked, WORKED_TOKENS, _on(ui)))
        worked = cache.value("exercises", _digest(asked, WORKED_TOKENS), make)
    seen: BaselinePictures | str | None = None
    if shown := q.pictures.prompts:
        make = staged(
            "pictures", len(shown), lambda s: _arrays(pictures.measure_baseline(s, shown, _on(ui)))
        )
        try:
            seen = BaselinePictures(**cache.arrays("pictures", q.pictures.digest, make))
        except pictures.CannotLookError as error:
            seen = str(error)
    speed = _throughput(baseline.subject, "baseline", ui) if q.throughput else None
    tasks: dict[str, Any] = {}
    if q.tasks is not None:
        choice = q.tasks
        make = staged("tasks", 0, lambda s: run_tasks(s, q.tokenizer, choice, q.longest, q.render))
        key = choice.digest if q.longest is None else _digest(choice.digest, q.longest)
        tasks = cache.value("tasks", key, make)
    return BaselineAnswers(
        text, said, likely, right(facts["logprobs"], q.facts), worked, tasks, speed, seen
    )


def ask_quantized(
    subject: Subject, questions: Questions, baseline: BaselineAnswers, ui: Reporter
) -> QuantizedAnswers:
    """All answers of the quantized model, on the same tokens as the baseline's."""
    q, windows = questions, questions.text.windows
    ui.stage("quantized: text", len(windows))
    text = texts.measure_quantized(subject, windows, baseline.text, _on(ui))
    cache = ask_cache(subject, windows, baseline.text, ui)
    ui.stage("quantized: canary", len(q.prompts))
    said = answer(subject, q.prompts, answer_tokens(q.prompts, q.longest), _on(ui))
    likely = answer_logprobs(subject, q.prompts, baseline.canary)
    ui.stage("quantized: facts", 4 * len(q.facts))
    facts = right(_facts(subject, q, ui), q.facts)
    worked: list[list[int]] = []
    if q.exercises:
        ui.stage("quantized: exercises", len(q.exercises))
        worked = answer(subject, q.exercise_prompts, WORKED_TOKENS, _on(ui))
    seen = ask_pictures(subject, q.pictures.prompts, baseline.pictures, ui)
    speed = _throughput(subject, "quantized", ui) if q.throughput else None
    tasks: dict[str, Any] = {}
    if q.tasks is not None:  # last: an engine of lm-eval's own takes the place of this one
        ui.stage("quantized: tasks")
        tasks = run_tasks(subject, q.tokenizer, q.tasks, q.longest, q.render)
    return QuantizedAnswers(text, said, likely, facts, worked, tasks, speed, cache, seen)


def ask_text_and_facts(
    subject: Subject, questions: Questions, baseline: BaselineAnswers, name: str, ui: Reporter
) -> tuple[QuantizedText, NDArray[np.bool_]]:
    """The text and the facts alone, of another model on the same tokens."""
    windows = questions.text.windows
    ui.stage(f"{name}: text", len(windows))
    text = texts.measure_quantized(subject, windows, baseline.text, _on(ui))
    ui.stage(f"{name}: facts", 4 * len(questions.facts))
    return text, right(_facts(subject, questions, ui), questions.facts)


def _throughput(subject: Subject, name: str, ui: Reporter) -> Throughput:
    ui.stage(f"{name}: throughput", 8)
    return subject.throughput(_on(ui))


def _facts(subject: Subject, questions: Questions, ui: Reporter) -> NDArray[np.float64]:
    q = questions
    return choice_logprobs(subject, q.tokenizer, q.facts, _on(ui), q.longest)


def _arrays(said: BaselineText | BaselinePictures) -> dict[str, NDArray[Any]]:
    return {name: value for name, value in vars(said).items() if value is not None}


def _on(ui: Reporter) -> Progress:
    return lambda done, _total: ui.advance(done)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
