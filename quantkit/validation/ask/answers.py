"""How lm-eval tasks are answered that are answered in words: sampled or greedily, after thinking,
how long, how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.calibration.chat import THINKING
from quantkit.checkpoint.directory import read_json
from quantkit.errors import InputError

THINKING_ENDS = "</think>"
QUESTION_TOKENS = 2048
"""Tokens of context and continuation that a model is given at one time, beside `new_tokens`."""
_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Answers:
    """sampled: as generation_config.json says, greedily (False), or as each task has it (None).
    thinking: what the chat template is told; None: what it does by itself. new_tokens: the most of
    an answer; None: as each task has it. seeds: answers to each question, of which the mean counts.
    sampling: what generation_config.json says, where it is asked."""

    sampled: bool | None = None
    thinking: bool | None = None
    new_tokens: int | None = None
    seeds: int = 1
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def named(self) -> list[str]:
        """The options of the command line that say so."""
        said = {
            "--sampled": self.sampled is True,
            "--greedy": self.sampled is False,
            "--thinking": self.thinking is True,
            "--no-thinking": self.thinking is False,
            "--new-tokens": self.new_tokens is not None,
            "--seeds": self.seeds != 1,
        }
        return [name for name, given in said.items() if given]

    def settings(self, seed: int) -> dict[str, Any]:
        """lm-eval's `gen_kwargs`, which take the place of those of each task."""
        found: dict[str, Any] = {}
        if self.sampled is False:
            found = {"do_sample": False, "temperature": 0.0}
        elif self.sampled:
            found = {"do_sample": True, **self.sampling, "seed": seed}
        return found | ({} if self.new_tokens is None else {"max_gen_toks": self.new_tokens})

    def described(self) -> str:
        """For a report; "" where everything is as the tasks have it."""
        parts = (
            {True: "sampled", False: "greedy", None: ""}[self.sampled],
            *(f"{name} {value:g}" for name, value in self.sampling.items()),
        )
        thinking = {True: "thinking", False: "without thinking", None: ""}[self.thinking]
        most = "" if self.new_tokens is None else f"at most {self.new_tokens} tokens"
        often = "" if self.seeds == 1 else f"the mean of {self.seeds} answers"
        return ", ".join(filter(None, (*parts, thinking, most, often)))


AS_TASKED = Answers()
"""Everything as each task has it."""


def settled(
    answers: Answers, model: Path, template: str | None, *, chat: bool, positions: int | None
) -> Answers:
    """With what the model's generation_config.json says. Raises InputError for what it does not, a
    template that cannot think, and answers that its network is too short for."""
    if answers.thinking is not None:
        _refuse_thoughts(answers, model, template, chat)
    if answers.new_tokens and positions and answers.new_tokens >= positions:
        raise InputError(
            f"--new-tokens {answers.new_tokens}: the network of {model} has {positions} positions, "
            "and the question takes some.",
            hint=f"--new-tokens {positions // 2}",
            code="validate.new_tokens",
        )
    if answers.seeds > 1 and not answers.sampled:
        raise InputError(
            f"--seeds {answers.seeds}: answers are only sampled with --sampled, and the same with "
            "every seed otherwise.",
            hint=f"--sampled --seeds {answers.seeds}",
            code="validate.seeds",
        )
    return replace(answers, sampling=_sampling(model)) if answers.sampled else answers


def _refuse_thoughts(answers: Answers, model: Path, template: str | None, chat: bool) -> None:
    asked = "--thinking" if answers.thinking else "--no-thinking"
    if not chat:
        raise InputError(
            f"{asked} is told to the chat template, and without --chat there is none.",
            hint=f"--chat {asked}",
            code="validate.thinking",
        )
    if THINKING not in (template or ""):
        raise InputError(
            f"{asked}: the chat template of {model} does not ask for {THINKING}.",
            hint=f"leave {asked} out",
            code="validate.thinking",
        )


def _sampling(model: Path) -> dict[str, float]:
    file = model / "generation_config.json"
    said = read_json(file) if file.is_file() else {}
    found = {name: said[name] for name in _SAMPLING if isinstance(said.get(name), int | float)}
    if not said.get("do_sample") or found.get("temperature", 1.0) <= 0:
        raise InputError(
            f"--sampled: {file} does not say that answers are sampled (do_sample: true).",
            hint="--greedy",
            code="validate.sampled",
        )
    return found
