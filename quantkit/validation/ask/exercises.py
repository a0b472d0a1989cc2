"""Exercises whose answers are written out by the model and checked by rule.

Choosing among given answers hides what generation loses: an error in one token is carried into the
next. Four kinds, made by code from a seed: arithmetic in two steps, copying, counting, and a JSON
object. They are asked of models with a chat template, all in one batch.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.calibration.tokenizer import Tokenizer
from quantkit.validation.ask.canary import chat_prompts

NEW_TOKENS = 48
MOST = 64
A_SAMPLE = 2
_SEED = 0
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
_THINGS = ("apples", "books", "coins", "stamps", "shells", "pens", "cards", "stones")
_WORDS = (
    "river", "stone", "cloud", "garden", "window", "paper", "silver", "bridge", "forest", "candle",
    "market", "summer", "letter", "castle", "harbor", "meadow",
)  # fmt: skip


@dataclass(frozen=True)
class Exercise:
    """What is asked, and whether an answer to it is right."""

    kind: str
    prompt: str
    holds: Callable[[str], bool]


def exercises(count: int) -> list[Exercise]:
    """`count` exercises, the kinds in turn; the same for the same count."""
    dice = random.Random(_SEED)  # noqa: S311
    makers = (_arithmetic, _copying, _counting, _object)
    return [makers[number % len(makers)](dice) for number in range(count)]


def chat_exercises(
    model: Path, tokenizer: Tokenizer, samples: int, longest: int | None
) -> tuple[list[Exercise], list[list[int]]]:
    """The exercises of a run with so many samples, and their prompts in token ids; none of a model
    without a chat template, nor of a network whose `longest` positions do not hold an answer."""
    asked = exercises(min(MOST, A_SAMPLE * samples))
    prompts = chat_prompts(model, tokenizer, [one.prompt for one in asked])
    if prompts is None:
        return [], []
    if longest is not None and max(map(len, prompts)) + NEW_TOKENS > longest:
        return [], []
    return asked, prompts


def solved(
    asked: Sequence[Exercise],
    answers: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    stops: set[int],
) -> NDArray[np.bool_]:
    """Whether each answer (token ids) is right, [exercises]."""
    texts = [tokenizer.decode([token for token in ids if token not in stops]) for ids in answers]
    found = [one.holds(text) for one, text in zip(asked, texts, strict=True)]
    return np.array(found, dtype=bool)


def by_kind(asked: Sequence[Exercise], right: NDArray[np.bool_]) -> dict[str, float]:
    """Kind → share of its exercises that were solved."""
    kinds = np.array([one.kind for one in asked])
    return {kind: float(right[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}


def _arithmetic(dice: random.Random) -> Exercise:
    name, thing = dice.choice(_NAMES), dice.choice(_THINGS)
    first, more = dice.randint(11, 40), dice.randint(2, 9)
    less = dice.randint(2, 9)
    prompt = (
        f"{name} has {first} {thing}, finds {more} more and gives {less} away. How many {thing} "
        f"does {name} have now? Calculate, then end with the number."
    )
    return Exercise("arithmetic", prompt, _ends_with(first + more - less))


def _copying(dice: random.Random) -> Exercise:
    text = " ".join(dice.sample(_WORDS, dice.randint(2, 5)))
    prompt = f'Write this again, word for word: "{text}"'
    return Exercise("copying", prompt, lambda said: text in said.lower())


def _counting(dice: random.Random) -> Exercise:
    first = dice.randint(1, 30)
    wanted = list(range(first, first + dice.randint(4, 9)))
    prompt = f"Count from {first} to {wanted[-1]}. Write the numbers with commas between them."
    return Exercise("counting", prompt, lambda said: _counts(said, wanted))


def _object(dice: random.Random) -> Exercise:
    name, age = dice.choice(_NAMES), dice.randint(20, 80)
    prompt = (
        f'{name} is {age} years old. Write this as a JSON object with the keys "name" and "age", '
        "and nothing else."
    )
    return Exercise("json", prompt, lambda said: _objects(said, {"name": name, "age": age}))


def _ends_with(number: int) -> Callable[[str], bool]:
    """Whether the last number of an answer is this one."""

    def holds(said: str) -> bool:
        found = re.findall(r"\d+", said.replace(",", ""))
        return bool(found) and int(found[-1]) == number

    return holds


def _counts(said: str, wanted: list[int]) -> bool:
    """Whether a line of an answer, or all of it, holds these numbers and no others."""
    lines = [[int(found) for found in re.findall(r"\d+", line)] for line in said.splitlines()]
    return wanted in lines or [number for line in lines for number in line] == wanted


def _objects(said: str, wanted: dict[str, object]) -> bool:
    """Whether the first JSON object of an answer is `wanted`."""
    start = said.find("{")
    if start < 0:
        return False
    try:
        found, _ = json.JSONDecoder().raw_decode(said[start:])
    except ValueError:
        return False
    return bool(found == wanted)
