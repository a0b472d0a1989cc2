"""The canary: does the model still talk? Greedy answers through its own chat template.

Good averages and "!!!!" in a chat go together (a wrong scale in one layer is enough), so that a few
real conversations are held, and what the baseline answers is the measure: a small model may loop
by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.calibration.chat import TemplateRefusalError, compile_template
from quantkit.calibration.tokenizer import Tokenizer, read_tokenizer_info
from quantkit.checkpoint.progress import Progress
from quantkit.validation.subjects.base import Subject

NEW_TOKENS = 48
QUESTIONS = (
    "What is the capital of France?",
    "What is 7 plus 5?",
    "Count from one to ten.",
    "Name three colors of the rainbow.",
    "How do you say 'good morning' in Spanish?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that adds two numbers.",
    "Write a short poem about the sea.",
)
BEGINNINGS = (
    "The capital of France is",
    "Seven plus five equals",
    "One, two, three, four,",
    "The three primary colors are",
    "In Spanish, 'good morning' is",
    "The sky looks blue because",
    'def add(a, b):\n    """Add two numbers."""\n',
    "The sea was calm that morning, and",
)
"""For a model without chat template: texts to go on with."""

LONGEST_PERIOD = 8
REPEATED = 24
"""Tokens at the end of an answer that repeat with a short period before it counts as a loop."""
LEAST_REPEATS = 4


@dataclass(frozen=True)
class Answer:
    """One prompt and what a model says to it; `problem` is "" for a sound answer."""

    prompt: str
    text: str
    problem: str


def canary_prompts(
    model: Path, tokenizer: Tokenizer, longest: int | None = None
) -> tuple[tuple[str, ...], list[list[int]]]:
    """The texts, and their token ids with the chat template around them where there is one; prompts
    lose their beginning where the network's `longest` positions hold no answer beside them."""
    texts, prompts = _prompts(model, tokenizer)
    if longest is None:
        return texts, prompts
    return texts, [ids[-max(1, longest - NEW_TOKENS) :] for ids in prompts]


def _prompts(model: Path, tokenizer: Tokenizer) -> tuple[tuple[str, ...], list[list[int]]]:
    turns = chat_prompts(model, tokenizer, QUESTIONS)
    if turns is not None:
        return QUESTIONS, turns
    return BEGINNINGS, [tokenizer.encode(text, True) for text in BEGINNINGS]


def chat_prompts(model: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]] | None:
    """Token ids of users' questions with the model's chat template around them; None without one,
    or where it wants something else."""
    info = read_tokenizer_info(model)
    if info.chat_template is None:
        return None
    render = compile_template(info.chat_template, info.special_tokens, generation_prompt=True)
    try:
        turns = [render([{"role": "user", "content": text}]) for text in texts]
    except TemplateRefusalError:
        return None
    return [tokenizer.encode(turn, False) for turn in turns]


def answer_tokens(prompts: Sequence[Sequence[int]], longest: int | None) -> int:
    """The most tokens of an answer: what the network's `longest` positions hold beside a prompt."""
    room = NEW_TOKENS if longest is None else longest - max(map(len, prompts))
    return max(1, min(NEW_TOKENS, room))


def answer(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    progress: Progress | None,
) -> list[list[int]]:
    """Greedy answers, in the dtype that the model is served in."""
    answers = subject.generate(prompts, new_tokens)
    if progress:
        progress(len(prompts), len(prompts))
    return answers


def judge(
    texts: Sequence[str], answers: Sequence[Sequence[int]], tokenizer: Tokenizer, stops: set[int]
) -> list[Answer]:
    """The answers as text, each with its problem."""
    judged = []
    for text, ids in zip(texts, answers, strict=True):
        said = [token for token in ids if token not in stops]
        judged.append(Answer(text, tokenizer.decode(said), problem(said, tokenizer)))
    return judged


def problem(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Why an answer (stop tokens left out) is degenerate, "" when it is not."""
    if not tokenizer.decode(list(ids)).strip():
        return "empty"
    period = repetition(ids)
    if period:
        return f"loops: its end repeats {tokenizer.decode(list(ids[-period:]))!r}"
    return ""


def repetition(ids: Sequence[int]) -> int:
    """The period (in tokens) with which the end of a sequence repeats, 0 when it does not.

    The end must hold `LEAST_REPEATS` periods and `REPEATED` tokens, or be all of the sequence.
    """
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(REPEATED, period * LEAST_REPEATS)
        tail = list(ids[-length:])
        if len(tail) >= period * LEAST_REPEATS and len(tail) >= min(length, len(ids)):
            same = all(tail[i] == tail[i - period] for i in range(period, len(tail)))
            if same:
                return period
    return 0


def answer_logprobs(
    subject: Subject, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """The mean log-probability (nats a token) that a model gives to each answer."""
    whole = [[*prompt, *ids] for prompt, ids in zip(prompts, answers, strict=True)]
    table = subject.logprobs(padded(whole))
    means = []
    for row, prompt, ids in zip(table, prompts, whole, strict=True):
        said = row[len(prompt) - 1 : len(ids) - 1]
        means.append(float(said.mean(dtype=np.float64)) if len(said) else 0.0)
    return means


def padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Rows of ids as one array, zeros after their end: causal attention never looks there."""
    array = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array
