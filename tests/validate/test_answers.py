"""How answers to lm-eval tasks are asked for: sampled, thought over, long, several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration.tokenizer import read_tokenizer_info
from quantkit.errors import InputError
from quantkit.runtime.network.generation import Sampling
from quantkit.validation.ask.answers import Answers, settled
from quantkit.validation.ask.tasks import TaskChoice, answered_as, choose_tasks, run_tasks
from quantkit.validation.preflight import chat_of, tokenizer_of
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import Builtin, open_builtin

pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install 'quantkit[eval]'")

TASK = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: {sampled}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
WARM = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
THINKS = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


class Recorded(Builtin):
    """The runtime, noting how it is asked."""

    def __init__(self, inside: Builtin) -> None:
        super().__init__(inside.runtime, 0.0)
        self.asked: list[tuple[int, int, Sampling]] = []

    def sample(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        self.asked.append((len(prompts), new_tokens, sampling))
        return super().sample(prompts, new_tokens, sampling)


@pytest.fixture
def subject(small_model: Path) -> Recorded:
    return Recorded(open_builtin(small_model, Opening("cpu")))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(WARM))
    return tmp_path


def words(folder: Path, answers: Answers, *, sampled: str = "false", chat: bool = False) -> Any:
    """A task of ten questions that are answered in words."""
    data, file = folder / "words.jsonl", folder / "local_words.yaml"
    rows = [{"question": f"Name number {n}.", "answer": "1"} for n in range(10)]
    data.write_text("\n".join(map(json.dumps, rows)))
    file.write_text(TASK.format(data=data, sampled=sampled))
    return choose_tasks([str(file)], None, chat=chat, answers=answers)


def test_what_generation_config_says_is_how_answers_are_drawn(
    model: Path, subject: Recorded, small_model: Path
) -> None:
    choice = words(model, Answers(sampled=True, new_tokens=8, seeds=2))
    choice = answered_as(choice, "builtin", model, None, None)
    assert choice.answers.described() == (
        "sampled, temperature 0.6, top_p 0.95, top_k 20, at most 8 tokens, the mean of 2 answers"
    )
    found = run_tasks(subject, tokenizer_of(small_model), choice)
    assert subject.asked == [
        (count, 8, Sampling(True, 0.6, 20, 0.95, seed)) for seed in (0, 1) for count in (8, 2)
    ]
    assert len(found["samples"]["local_words.exact_match"]) == 10


def test_greedy_takes_the_place_of_a_task_that_samples(
    model: Path, subject: Recorded, small_model: Path
) -> None:
    tokenizer = tokenizer_of(small_model)
    run_tasks(subject, tokenizer, words(model, Answers(), sampled="true"))
    run_tasks(subject, tokenizer, words(model, Answers(sampled=False), sampled="true"))
    assert [sampling.sample for _, _, sampling in subject.asked] == [True, True, False, False]


def test_the_mean_over_seeds_is_each_samples_own(model: Path, small_model: Path) -> None:
    """Right with the first of four seeds alone."""
    tokenizer = tokenizer_of(small_model)

    class Lucky(Recorded):
        def sample(
            self, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling
        ) -> list[list[int]]:
            return [tokenizer.encode("2" if sampling.seed else "1", False)] * len(prompts)

    choice = words(model, Answers(sampled=True, seeds=4))
    choice = answered_as(choice, "builtin", model, None, None)
    found = run_tasks(Lucky(open_builtin(small_model, Opening("cpu"))), tokenizer, choice)
    assert found["samples"]["local_words.exact_match"] == [0.25] * 10
    assert found["results"]["local_words"]["exact_match"] == 0.25


def test_thoughts_are_asked_of_the_template_and_left_out_of_the_answer(
    model: Path, small_model: Path, subject: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = read_tokenizer_info(small_model)
    object.__setattr__(info, "chat_template", f"{info.chat_template}{THINKS}")
    said = [chat_of(info, on) for on in (None, True, False)]
    texts = [render([{"role": "user", "content": "Hi"}]) for render in said if render]
    assert [text.endswith("<think></think>") for text in texts] == [False, False, True]
    tokenizer = tokenizer_of(small_model)
    thought = tokenizer.encode("so it is 2\nor not</think>1\n3", False)
    monkeypatch.setattr(Recorded, "sample", lambda self, prompts, *_: [thought] * len(prompts))
    choice = words(model, Answers(thinking=True), chat=True)
    found = run_tasks(subject, tokenizer, choice, None, said[1])
    assert found["results"]["local_words"]["exact_match"] == 1


@pytest.mark.parametrize(
    ("answers", "chat", "said"),
    [
        (Answers(thinking=True), False, "--thinking is told to the chat template"),
        (Answers(thinking=False), True, "does not ask for enable_thinking"),
        (Answers(new_tokens=4096), False, "has 2048 positions"),
        (Answers(seeds=3), False, "--seeds 3: answers are only sampled with --sampled"),
        (Answers(sampled=True), False, r"does not say that answers are sampled"),
    ],
)
def test_what_the_model_does_not_do_is_refused(
    answers: Answers, chat: bool, said: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    with pytest.raises(InputError, match=said) as caught:
        settled(answers, tmp_path, "{{ messages }}", chat=chat, positions=2048)
    assert caught.value.hint


def test_what_an_engines_harness_does_not_do_is_refused(model: Path) -> None:
    choice = TaskChoice(("t",), (), None, False, True, None, Answers(thinking=True))
    with pytest.raises(InputError, match="SGLang tells the chat template nothing"):
        answered_as(choice, "sglang", model, "enable_thinking", None)
    choice = TaskChoice(("t",), (), None, False, True, None, Answers(sampled=True))
    with pytest.raises(InputError, match="Transformers answers greedily"):
        answered_as(choice, "transformers", model, None, None)
    with pytest.raises(InputError, match="--seeds is about lm-eval tasks"):
        choose_tasks([], None, answers=Answers(seeds=2))
