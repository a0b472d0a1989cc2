"""Exercises: what counts as right, and who is asked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.validation.ask.exercises import (
    MOST,
    NEW_TOKENS,
    by_kind,
    chat_exercises,
    exercises,
    solved,
)
from tests.support.helpers import edit_json

ALL = exercises(MOST)


def said_right(kind: str, prompt: str) -> str:
    """A right answer, found in another way than the rule's."""
    if kind == "arithmetic":
        first, more, less = map(int, re.findall(r"\d+", prompt))
        return f"{first} + {more} = {first + more}, less {less} is {first + more - less}."
    if kind == "copying":
        return f"Sure: {prompt.partition(': ')[2]}"
    if kind == "counting":
        first, last = map(int, re.findall(r"\d+", prompt))
        return "Here you are:\n" + ", ".join(str(number) for number in range(first, last + 1))
    name, age = prompt.split()[0], re.findall(r"\d+", prompt)[0]
    return f'```json\n{{"name": "{name}", "age": {age}}}\n```'


@pytest.mark.parametrize("one", ALL[:8], ids=lambda one: one.kind)
def test_a_right_answer_is_right_and_another_is_not(one: object) -> None:
    assert one.holds(said_right(one.kind, one.prompt))  # type: ignore[attr-defined]
    others = [said_right(other.kind, other.prompt) for other in ALL[8:]]
    wrong = ["", "I do not know.", "{", "9999", *others]
    found = [one.holds(text) for text in wrong]  # type: ignore[attr-defined]
    assert sum(found) <= 0.2 * len(found)  # some numbers are the same by chance
    assert not any(found[:4])


def test_exercises_are_many_and_always_the_same() -> None:
    assert [one.prompt for one in exercises(MOST)] == [one.prompt for one in ALL]
    assert len({one.prompt for one in ALL}) > 0.9 * MOST
    assert {one.kind for one in exercises(4)} == {one.kind for one in ALL}


def test_answers_are_read_without_stop_tokens(small_model: Path) -> None:
    tokenizer = load_tokenizer(read_tokenizer_info(small_model))
    asked, prompts = chat_exercises(small_model, tokenizer, 4, None)
    assert len(asked) == len(prompts) == 8
    said = [tokenizer.encode(said_right(one.kind, one.prompt), False) for one in asked]
    right = solved(asked, [[*said[0], 2], *said[1:7], []], tokenizer, {2})
    assert right.tolist() == [True] * 7 + [False]
    assert by_kind(asked, right) == {"arithmetic": 1, "copying": 1, "counting": 1, "json": 0.5}


def test_models_that_do_not_chat_are_not_asked(small_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(read_tokenizer_info(small_model))
    longest = max(map(len, chat_exercises(small_model, tokenizer, 32, None)[1]))
    assert len(chat_exercises(small_model, tokenizer, 100, longest + NEW_TOKENS)[0]) == MOST
    assert chat_exercises(small_model, tokenizer, 32, longest) == ([], [])
    mute = Path(shutil.copytree(small_model, tmp_path / "mute"))
    (mute / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(mute / "tokenizer_config.json", lambda c: c.pop("chat_template", None))
    assert chat_exercises(mute, tokenizer, 32, None) == ([], [])
    assert by_kind([], np.array([], dtype=bool)) == {}
