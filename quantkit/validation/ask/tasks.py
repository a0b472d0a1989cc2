"""lm-eval tasks by name, through lm-eval's own harness, with a subject as its model.

Harness: https://github.com/EleutherAI/lm-evaluation-harness (`lm_eval.api.model.LM`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from quantkit.calibration.chat import Render
from quantkit.calibration.tokenizer import Tokenizer
from quantkit.errors import BackendError, InputError, QuantkitError
from quantkit.validation.ask.answers import (
    AS_TASKED,
    QUESTION_TOKENS,
    THINKING_ENDS,
    Answers,
    settled,
)
from quantkit.validation.ask.lm_eval_model import as_lm
from quantkit.validation.subjects.base import Subject

_TASK_LINE = re.compile(r"^task:\s*[\"']?([\w.\-]+)", re.MULTILINE)
TASK_FILES = frozenset({".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt"})
"""What a task is made of; its folder may hold models and logs beside it."""


@dataclass(frozen=True)
class TaskChoice:
    """Tasks to run: names of lm-eval, or YAML files of tasks; `limit` is the most samples of each.

    `names` are what lm-eval calls them, `folders` hold the YAML files; `bundled` says that some
    task is lm-eval's own. `chat` puts the model's chat template around each question; `fewshot` is
    how many answered ones stand before it (None: as the task has it), `answers` how it is answered.
    """

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    limit: int | None
    bundled: bool
    chat: bool = False
    fewshot: int | None = None
    answers: Answers = AS_TASKED

    @property
    def digest(self) -> str:
        """Changes with the tasks, the files that make them (`TASK_FILES`, also in folders inside),
        the limit and the harness."""
        from importlib.metadata import version

        asked = (self.chat, self.fewshot, self.answers)
        settings = (self.names, self.limit, version("lm_eval"), *asked)
        total = hashlib.sha256(repr(settings).encode())
        for folder in self.folders:
            made = (file for file in folder.rglob("*") if file.suffix in TASK_FILES)
            for file in sorted(file for file in made if file.is_file()):
                total.update(f"{file.relative_to(folder)}\n".encode())
                with file.open("rb") as handle:
                    total.update(hashlib.file_digest(handle, "sha256").digest())
        return total.hexdigest()


def choose_tasks(
    asked: Sequence[str],
    limit: int | None,
    *,
    chat: bool = False,
    fewshot: int | None = None,
    answers: Answers = AS_TASKED,
) -> TaskChoice | None:
    """The tasks of `--tasks`; None when none are asked for.

    Raises InputError when lm-eval is not installed, or does not know a name, and for settings of
    tasks without a task.
    """
    if not asked:
        few = [] if fewshot is None else ["--fewshot"]
        if named := [*(["--chat"] if chat else []), *few, *answers.named]:
            raise InputError(
                f"{named[0]} is about lm-eval tasks, and there are none.",
                hint=f"--tasks gsm8k {named[0]} …",
                code="validate.no_tasks",
            )
        return None
    if find_spec("lm_eval") is None:
        raise InputError(
            f"--tasks {','.join(asked)} needs lm-eval, which is not installed.",
            hint="pip install 'quantkit[eval]'",
            code="validate.no_lm_eval",
        )
    names: list[str] = []
    folders: list[Path] = []
    bundled = False
    for entry in asked:
        file = Path(entry)
        if file.suffix in (".yaml", ".yml"):
            names.append(_task_in(file))
            folders.append(file.parent.resolve())
        else:
            names.append(entry)
            bundled = True
    where = tuple(dict.fromkeys(folders))
    choice = TaskChoice(tuple(names), where, limit, bundled, chat, fewshot, answers)
    known = set(_manager(choice.folders, choice.bundled).all_tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"lm-eval has no task {unknown[0]!r}.",
            hint="lm-eval ls tasks  # their names; or give the YAML file of a task",
            code="validate.unknown_task",
        )
    return choice


def answered_as(
    choice: TaskChoice, engine: str, model: Path, template: str | None, positions: int | None
) -> TaskChoice:
    """The tasks with what the model itself says of answers; InputError for what the model or the
    engine's harness does not do."""
    answers = choice.answers
    if answers.thinking is not None and engine == "sglang":
        raise InputError(
            "lm-eval's backend for SGLang tells the chat template nothing of thinking.",
            hint="validate with --engine vllm or builtin",
            code="validate.thinking",
        )
    if answers.sampled and engine == "transformers":
        raise InputError(
            "Transformers answers greedily here.",
            hint="--greedy, or validate with --engine vllm, sglang or builtin",
            code="validate.sampled",
        )
    told = settled(answers, model, template, chat=choice.chat, positions=positions)
    return replace(choice, answers=told)


def asked_how(choice: TaskChoice | None) -> list[str]:
    """A note for the report, where the command said how tasks are answered."""
    said = choice.answers.described() if choice else ""
    return [f"lm-eval tasks were answered {said}"] if said else []


@runtime_checkable
class WithHarness(Protocol):
    """A subject for whose engine lm-eval may have a backend of its own."""

    def harness(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """What that backend finds; None where there is none. The subject is not used again."""
        ...


def run_tasks(
    subject: Subject,
    tokenizer: Tokenizer,
    choice: TaskChoice,
    longest: int | None = None,
    render: Render | None = None,
) -> dict[str, Any]:
    """`results`: task → metric → value, and `samples`: "task.metric" → a value a sample, higher
    being better. `longest` are the network's positions, where they are fewer than the answers need;
    `render` is its chat template. By lm-eval's own backend where the engine has one: then the
    subject is not used again. Raises BackendError when the harness fails."""
    room = (choice.answers.new_tokens or 0) + QUESTION_TOKENS
    if isinstance(subject, WithHarness):
        asked = {
            **asdict(choice),
            "folders": list(map(str, choice.folders)),
            "settings": [choice.answers.settings(seed) for seed in range(choice.answers.seeds)],
            "room": room,
            "thoughts_end": THINKING_ENDS,
        }
        answered = subject.harness(asked)
        if answered is not None:
            return _mean(answered["runs"])
    import lm_eval

    if choice.chat and render is None:
        raise InputError(
            "--chat: the model has no chat template.",
            hint="leave --chat out",
            code="validate.no_chat_template",
        )
    model = as_lm(subject, tokenizer, min(room, longest or room), render if choice.chat else None)
    runs = []
    try:
        for seed in range(choice.answers.seeds):
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(choice.names),
                task_manager=_manager(choice.folders, choice.bundled),
                limit=choice.limit,
                num_fewshot=choice.fewshot,
                apply_chat_template=choice.chat,
                gen_kwargs=choice.answers.settings(seed) or None,
                bootstrap_iters=0,
                log_samples=True,
            )
            assert found is not None
            runs.append(found)
    except QuantkitError:
        raise
    except Exception as error:  # tasks bring code and fetch data: anything may be raised
        first = (str(error).strip().splitlines() or [""])[0]
        raise BackendError(
            f"lm-eval could not run {', '.join(choice.names)}: {type(error).__name__}: {first}",
            hint="run the task with lm-eval alone; it may need its data from the hub",
            code="validate.lm_eval",
        ) from error
    return _mean(runs)


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`results` and `samples` of `run_tasks`, means over runs with other seeds."""
    results, samples = [_numbers(run["results"]) for run in runs], [_by_sample(r) for r in runs]
    return {
        "results": {
            task: {name: sum(run[task][name] for run in results) / len(runs) for name in metrics}
            for task, metrics in results[0].items()
        },
        "samples": {
            name: [sum(each) / len(runs) for each in zip(*(s[name] for s in samples), strict=True)]
            for name in samples[0]
        },
    }


def _numbers(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and "_stderr" not in name and name != "alias"
        }
        for task, metrics in results.items()
    }


def _by_sample(found: Any) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    for task, rows in found["samples"].items():
        better = found["higher_is_better"].get(task, {})
        for row in rows:
            suffix = "" if row["filter"] == "none" else f".{row['filter']}"
            for metric in row["metrics"]:
                value = row.get(metric)
                if isinstance(value, int | float | np.number):
                    sign = -1.0 if better.get(metric) is False else 1.0
                    samples.setdefault(f"{task}.{metric}{suffix}", []).append(sign * float(value))
    return samples


def _task_in(file: Path) -> str:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = _TASK_LINE.search(text)
    if match is None:
        what = "has no line task: NAME" if text else "does not exist"
        raise InputError(
            f"The task file {file} {what}.",
            hint="--tasks with the YAML file of an lm-eval task",
            code="validate.task_file",
        )
    return match.group(1)


@cache
def _manager(folders: tuple[Path, ...], bundled: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=[str(folder) for folder in folders] or None,
        include_defaults=bundled,  # thousands of files to look through
    )
