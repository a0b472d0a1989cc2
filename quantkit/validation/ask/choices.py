"""Four-choice facts by log-likelihood: the choice that a model finds likeliest is its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from quantkit.calibration.tokenizer import Tokenizer
from quantkit.checkpoint.progress import Progress
from quantkit.validation.ask.canary import padded
from quantkit.validation.ask.text import WithLogits
from quantkit.validation.subjects.base import Subject
from quantkit.validation.subjects.builtin import next_logprobs

BATCH = 64
"""Sequences a call; they are sorted by length first, so that little of it is padding."""


@dataclass(frozen=True)
class Question:
    """A prompt, its choices, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def facts(most: int | None = None) -> list[Question]:
    """374 questions on capitals and chemical elements (from bsdgames; see facts/NOTICE.txt), or
    `most` of them, spread evenly."""
    text = (
        files("quantkit.validation.ask").joinpath("facts/facts.jsonl").read_text(encoding="utf-8")
    )
    rows = [json.loads(line) for line in text.splitlines()]
    chosen = np.linspace(0, len(rows) - 1, min(most or len(rows), len(rows))).round().astype(int)
    return [
        Question(row["prompt"], tuple(row["choices"]), row["answer"])
        for row in (rows[index] for index in chosen)
    ]


def choice_logprobs(
    subject: Subject,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    progress: Progress | None = None,
    longest: int | None = None,
) -> NDArray[np.float64]:
    """The log-probability of every choice after its prompt, [questions, choices]; a prompt
    loses its beginning where the network's `longest` positions do not hold it."""
    prompts = [tokenizer.encode(question.prompt, True) for question in questions]
    pairs = [
        (prompt, tokenizer.encode(f" {choice}", False))
        for question, prompt in zip(questions, prompts, strict=True)
        for choice in question.choices
    ]
    if longest is not None:
        pairs = [(prompt[-max(1, longest - len(said)) :], said) for prompt, said in pairs]
    totals = continuation_logprobs(subject, pairs, progress)
    return totals.reshape(len(questions), -1)


def continuation_logprobs(
    subject: Subject,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """(context ids, continuation ids) → the sum of the continuation's log-probabilities, [pairs].

    Contexts are not empty.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    totals = np.zeros(len(pairs))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        shortest = min(len(pairs[i][0]) for i in batch)
        windows = padded([[*pairs[i][0], *pairs[i][1]] for i in batch])
        table = _logprobs_from(subject, windows, shortest)
        for row, index in zip(table, batch, strict=True):
            context, continuation = pairs[index]
            begin = len(context) - shortest
            totals[index] = row[begin : begin + len(continuation)].sum(dtype=np.float64)
        if progress:
            progress(start + len(batch), len(order))
    return totals


def _logprobs_from(subject: Subject, windows: NDArray[np.int64], start: int) -> NDArray[np.float32]:
    """The log-probabilities of the tokens from position `start` on, [n, length - start]."""
    import torch

    if not isinstance(subject, WithLogits):
        return subject.logprobs(windows)[:, start - 1 :]
    parts = []
    for rows, logits in subject.logits(windows, last=windows.shape[1] - start + 1):
        following = torch.from_numpy(windows[rows, start:]).to(logits.device)
        parts.append(next_logprobs(logits[:, :-1], following).cpu().numpy())
    return np.concatenate(parts)


def right(logprobs: NDArray[np.float64], questions: Sequence[Question]) -> NDArray[np.bool_]:
    """Whether the likeliest choice is the answer, [questions]; NaN is wrong."""
    answers = np.array([question.answer for question in questions])
    best = np.where(np.isnan(logprobs), -np.inf, logprobs).argmax(axis=1)
    return np.asarray((best == answers) & ~np.isnan(logprobs).all(axis=1))
