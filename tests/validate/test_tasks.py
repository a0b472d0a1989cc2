"""lm-eval's own harness over the runtime, on tasks and data that are written here."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.calibration.tokenizer import read_tokenizer_info
from quantkit.errors import BackendError, InputError
from quantkit.runtime.serving.drivers.harness import name_distribution
from quantkit.validation.ask.answers import Answers
from quantkit.validation.ask.choices import choice_logprobs, facts, right
from quantkit.validation.ask.tasks import choose_tasks, run_tasks
from quantkit.validation.preflight import chat_of, tokenizer_of
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import Builtin, open_builtin
from quantkit.validation.subjects.engines import opener

pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install 'quantkit[eval]'")

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
CHOICES = """
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
COMPLETION = """
doc_to_text: "{{prompt}}"
doc_to_target: " {{target}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
GENERATION = """
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: SAMPLE}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def subject(small_model: Path) -> Builtin:
    return open_builtin(small_model, Opening("cpu"))


@pytest.fixture
def task(tmp_path: Path):
    """A function that writes a task over the facts and gives its file."""
    data = tmp_path / "facts.jsonl"
    rows = [
        {"prompt": q.prompt, "choices": q.choices, "answer": q.answer, "target": q.choices[0]}
        for q in facts()[:12]
    ]
    data.write_text("\n".join(map(json.dumps, rows)))

    def write(name: str, kind: str, body: str) -> str:
        file = tmp_path / f"{name}.yaml"
        file.write_text(HEAD.format(name=name, data=data, kind=kind) + body)
        return str(file)

    return write


def test_choices_are_answered_as_without_the_harness(
    task, subject: Builtin, small_model: Path
) -> None:
    tokenizer = tokenizer_of(small_model)
    choice = choose_tasks([task("local_facts", "multiple_choice", CHOICES)], None)
    assert choice is not None
    found = run_tasks(subject, tokenizer, choice)
    questions = facts()[:12]
    wanted = right(choice_logprobs(subject, tokenizer, questions), questions)
    assert found["samples"]["local_facts.acc"] == wanted.astype(float).tolist()
    assert found["results"]["local_facts"]["acc"] == pytest.approx(wanted.mean())


def test_completions_rolling_and_generated_answers_run(
    task, subject: Builtin, small_model: Path
) -> None:
    files = [
        task("local_words", "loglikelihood", COMPLETION),
        task("local_text", "loglikelihood_rolling", ROLLING),
        task("local_answers", "generate_until", GENERATION.replace("SAMPLE", "false")),
    ]
    choice = choose_tasks(files, 3)
    assert choice is not None
    found = run_tasks(subject, tokenizer_of(small_model), choice)
    assert len(found["samples"]["local_words.acc"]) == 3
    assert found["results"]["local_text"]["word_perplexity"] > 1
    assert len(found["samples"]["local_answers.exact_match"]) == 3


def test_a_task_that_cannot_run_says_so(task, subject: Builtin, small_model: Path) -> None:
    file = task("local_broken", "multiple_choice", CHOICES.replace("choices", "missing_field"))
    choice = choose_tasks([file], 1)
    assert choice is not None
    with pytest.raises(BackendError, match="lm-eval could not run local_broken"):
        run_tasks(subject, tokenizer_of(small_model), choice)


def test_a_digest_is_of_what_makes_the_task(task, tmp_path: Path) -> None:
    choice = choose_tasks([task("local_digest", "multiple_choice", CHOICES)], None)
    assert choice is not None
    before = choice.digest
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "run.log").write_text("today")
    assert choice.digest == before
    (tmp_path / "lib").mkdir()
    helper = tmp_path / "lib" / "helper.py"
    helper.write_text("one = 1")
    changed = choice.digest
    helper.write_text("one = 2")
    assert len({before, changed, choice.digest}) == 3


def test_task_files_without_a_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("output_type: multiple_choice\n")
    with pytest.raises(InputError, match="has no line task: NAME"):
        choose_tasks([str(file)], None)


def test_chat_and_examples_reach_the_model(task, subject: Builtin, small_model: Path) -> None:
    """Through the template a question begins a turn, and the answered examples are turns too."""
    file = task("local_facts", "multiple_choice", CHOICES)
    with pytest.raises(InputError, match="--chat is about lm-eval tasks"):
        choose_tasks([], None, chat=True)
    asked: list[str] = []
    render = chat_of(read_tokenizer_info(small_model))
    assert render is not None

    def noting(messages: Any, tools: Any = None) -> str:
        asked.append(render(messages, tools))
        return asked[-1]

    plain, chat = (choose_tasks([file], 4, chat=on, fewshot=2) for on in (False, True))
    assert plain is not None
    assert chat is not None
    assert plain.digest != chat.digest
    tokenizer = tokenizer_of(small_model)
    without = run_tasks(subject, tokenizer, plain)
    found = run_tasks(subject, tokenizer, chat, None, noting)
    assert found["results"].keys() == without["results"].keys()
    assert len(asked) == 4
    assert all(text.count("<|im_start|>user") == 3 for text in asked)
    assert all(text.endswith("<|im_start|>assistant\n") for text in asked)
    with pytest.raises(InputError, match="no chat template"):
        run_tasks(subject, tokenizer, chat)


def test_an_engine_under_another_name_has_a_version_by_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert name_distribution("pytest", "1.0") is None
    with pytest.raises(PackageNotFoundError):
        version("anengine")
    kept = name_distribution("anengine", "0.32.0")
    assert kept is not None
    assert version("anengine") == "0.32.0"
    kept.cleanup()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("vllm_python")
def test_vllm_is_asked_by_the_harness_of_its_own(task, subject: Builtin, small_model: Path) -> None:
    """lm-eval's own backend in vLLM's environment, which has no lm-eval, answers as the runtime."""
    files = [
        task("local_facts", "multiple_choice", CHOICES),
        task("local_answers", "generate_until", GENERATION.replace("SAMPLE", "false")),
    ]
    choice = choose_tasks(files, 6, chat=True)
    assert choice is not None
    tokenizer = tokenizer_of(small_model)
    render = chat_of(read_tokenizer_info(small_model))
    ours = run_tasks(subject, tokenizer, choice, None, render)
    vllm = opener("vllm")(small_model, Opening())
    try:
        theirs = run_tasks(vllm, tokenizer, choice)
    finally:
        vllm.close()
    assert theirs["samples"].keys() == ours["samples"].keys()
    apart = np.abs(
        np.subtract(theirs["samples"]["local_facts.acc"], ours["samples"]["local_facts.acc"])
    )
    assert apart.sum() <= 1  # a tie of the cut network
    assert theirs["results"]["local_facts"].keys() == ours["results"]["local_facts"].keys()
    sampled = Answers(True, None, 8, 2, {"temperature": 0.8, "top_p": 0.9})
    choice = choose_tasks(files[1:], 4, chat=True, answers=sampled)
    assert choice is not None
    vllm = opener("vllm")(small_model, Opening())
    try:
        found = run_tasks(vllm, tokenizer, choice)
    finally:
        vllm.close()
    assert len(found["samples"]["local_answers.exact_match"]) == 4
