"""What `validate` says of its time before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantkit.validation import forecast as module
from quantkit.validation.ask.picture_prompts import NONE, PicturePrompt, PicturePrompts
from quantkit.validation.forecast import Pace, forecast, pace, seconds


def questions(**more: Any) -> Any:
    fields = {
        "text": SimpleNamespace(windows=np.zeros((8, 500), np.int64)),
        "prompts": [[1] * 20] * 4,
        "facts": [SimpleNamespace(prompt="x" * 10, choices=("a", "b"))] * 5,
        "exercises": [None] * 6,
        "exercise_prompts": [[1] * 30] * 6,
        "tokenizer": SimpleNamespace(encode=lambda text, _: list(text)),
        "throughput": True,
        "longest": None,
        "pictures": NONE,
    }
    return SimpleNamespace(**{**fields, **more})


class Slow:
    """A model whose clock runs a second a token that is read, and ten a step."""

    now = 0.0

    def logprobs(self, windows: Any, _progress: Any = None) -> Any:
        self.now += windows.size
        return np.zeros((len(windows), windows.shape[1] - 1), np.float32)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        self.now += sum(map(len, prompts)) + 10 * new_tokens
        return [[] for _ in prompts]


def test_pace_is_measured_on_one_window_and_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    slow: Any = Slow()
    monkeypatch.setattr(module, "perf_counter", lambda: slow.now)
    assert pace(slow, questions()) == Pace(1.0, 10.0)
    assert slow.now == 500 + 80 + 40


def test_parts_follow_what_is_asked() -> None:
    parts = seconds(Pace(0.01, 0.1), questions())
    assert parts["text"] == pytest.approx(40)
    assert parts["facts"] == pytest.approx(0.01 * 10 * 2 * 5)
    assert parts["throughput"] == pytest.approx(4 * (0.01 * 256 * 9 + 2 * 0.1 * 32))
    assert parts["exercises"] == pytest.approx(0.01 * 180 + 0.1 * 48)
    assert "exercises" not in seconds(Pace(0.01, 0.1), questions(exercises=[]))
    shown = SimpleNamespace(prompts=[SimpleNamespace(ids=[1] * 70)] * 3)
    assert "pictures" not in parts
    assert seconds(Pace(0.01, 0.1), questions(pictures=shown))["pictures"] == pytest.approx(2.1)
    more = seconds(Pace(0.01, 0.1), questions(throughput=False, facts=questions().facts * 2))
    assert "throughput" not in more
    assert more["facts"] == pytest.approx(2 * parts["facts"])
    assert more["canary"] == parts["canary"]


def test_the_longest_part_is_named() -> None:
    parts = {"text": 30.0, "canary": 10.0, "facts": 50.0, "throughput": 40.0}
    told = forecast(parts, baseline=True, cached=False, tasks=False, rounded=False)
    assert told.startswith("this will take about 4 min: text 60 s, canary 20 s")
    assert "facts 2 min (the longest)" in told
    again = forecast(parts, baseline=True, cached=True, tasks=True, rounded=True)
    assert "about 3 min, and the lm-eval tasks" in again
    assert again.endswith("rounded to nearest 30 s")
    assert "throughput 80 s (the longest)" in again
    assert "facts 50 s" in again
    alone = forecast(parts, baseline=False, cached=True, tasks=False, rounded=False)
    assert "throughput 40 s" in alone


def test_pictures_are_a_part_of_their_own() -> None:
    shown = PicturePrompts((PicturePrompt("?", ".", [1] * 40, {}, 9),) * 3)
    known = seconds(Pace(1.0, 0.0), questions(pictures=shown))
    assert known["pictures"] == 3 * 40
    assert "pictures" not in seconds(Pace(1.0, 0.0), questions())
