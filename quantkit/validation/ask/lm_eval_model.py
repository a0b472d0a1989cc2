"""A subject as lm-eval's model: log-likelihoods, rolling ones, and answers in words.

Harness: https://github.com/EleutherAI/lm-evaluation-harness (`lm_eval.api.model.LM`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from quantkit.calibration.chat import Render
from quantkit.calibration.tokenizer import Tokenizer
from quantkit.errors import InputError
from quantkit.validation.ask.answers import THINKING_ENDS
from quantkit.validation.ask.choices import continuation_logprobs
from quantkit.validation.subjects.base import Subject

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    from quantkit.runtime.network.generation import Sampling

DEFAULT_NEW_TOKENS = 256
GENERATED = 8
"""Prompts that are continued at one time."""


@runtime_checkable
class WithSampling(Protocol):
    """A subject that can also draw its answers."""

    def sample(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        """As `generate`, each token drawn."""
        ...


def as_lm(subject: Subject, tokenizer: Tokenizer, longest: int, render: Render | None = None) -> LM:
    """With the chat template `render` texts bring their special tokens along."""
    special = render is None
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class SubjectLM(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            pairs = [_split(tokenizer, longest, special, *request.args) for request in requests]
            totals = continuation_logprobs(subject, pairs)
            greedy = [False] * len(pairs)
            asked = Counter((request.task_name, request.doc_id) for request in requests)
            alone = [i for i, r in enumerate(requests) if asked[r.task_name, r.doc_id] == 1]
            for index, same in zip(alone, _greedy(subject, [pairs[i] for i in alone]), strict=True):
                greedy[index] = same  # of several choices nobody asks which one is greedy
            return list(zip(totals.tolist(), greedy, strict=True))

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            results = []
            for request in requests:
                ids = tokenizer.encode(request.args[0], False)
                windows = get_rolling_token_windows(ids, _first_token(tokenizer), longest - 1, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                results.append(float(continuation_logprobs(subject, pairs).sum()))
            return results

        def generate_until(self, requests: list[Instance]) -> list[str]:
            found = [""] * len(requests)
            for settings in {repr(one.args[1]): one.args[1] for one in requests}.values():
                alike = [i for i, request in enumerate(requests) if request.args[1] == settings]
                for start in range(0, len(alike), GENERATED):
                    batch = alike[start : start + GENERATED]
                    texts = [requests[index].args[0] for index in batch]
                    said = _answers(subject, tokenizer, longest, special, texts, settings)
                    for index, text in zip(batch, said, strict=True):
                        found[index] = text
            return found

        def apply_chat_template(
            self,
            chat_history: list[dict[str, str]],
            add_generation_prompt: bool = True,  # noqa: ARG002  the template's is fixed
        ) -> str:
            assert render is not None
            return render(chat_history)

        @property
        def tokenizer_name(self) -> str:
            return "the model's own"

    return SubjectLM()


def _first_token(tokenizer: Tokenizer) -> int:
    """What an empty context is: the token that begins documents, else the first of a line break."""
    return (tokenizer.encode("", True) or tokenizer.encode("\n", False))[0]


def _split(
    tokenizer: Tokenizer, longest: int, special: bool, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Ids of both, tokenized as one text; the context loses its beginning when it is too long."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return [_first_token(tokenizer)], tokenizer.encode(continuation, False)[: longest - 1]
    whole = tokenizer.encode(stripped + continuation, special)
    count = len(tokenizer.encode(stripped, special))
    said = whole[count:]
    room = max(longest - len(said), 1)
    return whole[:count][-room:], said[: longest - 1]


def _greedy(subject: Subject, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
    """Whether each continuation is what the model would say itself."""
    same: list[bool] = []
    for start in range(0, len(pairs), GENERATED):
        batch = pairs[start : start + GENERATED]
        most = max(len(said) for _, said in batch)
        answers = subject.generate([context for context, _ in batch], most)
        same += [a[: len(said)] == said for a, (_, said) in zip(answers, batch, strict=True)]
    return same


def _answers(
    subject: Subject,
    tokenizer: Tokenizer,
    longest: int,
    special: bool,
    contexts: Sequence[str],
    settings: Mapping[str, Any],
) -> list[str]:
    """What follows each context, up to what ends an answer and without the thoughts before it."""
    until = settings.get("until", [])
    stops = [until] if isinstance(until, str) else list(until)
    most = min(int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), longest - 1)
    ids = [tokenizer.encode(context, special)[-(longest - most) :] for context in contexts]
    texts = [tokenizer.decode(one) for one in _generated(subject, ids, most, settings)]
    found = []
    for text in texts:
        said = text.rpartition(THINKING_ENDS)[2]
        for stop in stops:
            said = said.split(stop)[0] if stop else said
        found.append(said)
    return found


def _generated(
    subject: Subject, prompts: Sequence[Sequence[int]], most: int, settings: Mapping[str, Any]
) -> list[list[int]]:
    temperature = float(settings.get("temperature", 1.0))
    if not settings.get("do_sample") or temperature <= 0:
        return subject.generate(prompts, most)
    if not isinstance(subject, WithSampling):
        raise InputError(
            f"Answers are to be sampled, and {subject.name} answers greedily here.",
            hint="--greedy",
            code="validate.task_samples",
        )
    from quantkit.runtime.network.generation import Sampling

    top_k = max(int(settings.get("top_k", 0)), 0)
    top_p, seed = float(settings.get("top_p", 1.0)), int(settings.get("seed", 0))
    return subject.sample(prompts, most, Sampling(True, temperature, top_k, top_p, seed))
