"""lm-eval tasks by name, through lm-eval's own harness, with a subject as its model.

Harness: https://github.com/EleutherAI/lm-evaluation-harness (`lm_eval.api.model.LM`).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from quantkit.calibration.chat import Render
from quantkit.calibration.tokenizer import Tokenizer
from quantkit.errors import BackendError, InputError, QuantkitError
from quantkit.validation.ask.choices import continuation_logprobs
from quantkit.validation.subjects.base import Subject

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

_TASK_LINE = re.compile(r"^task:\s*[\"']?([\w.\-]+)", re.MULTILINE)
DEFAULT_NEW_TOKENS = 256
LONGEST = 2048
"""Tokens of context and continuation that a model is given at one time."""
TASK_FILES = frozenset({".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt"})
"""What a task is made of; its folder may hold models and logs beside it."""
GENERATED = 8
"""Prompts that are continued at one time."""


@dataclass(frozen=True)
class TaskChoice:
    """Tasks to run: names of lm-eval, or YAML files of tasks; `limit` is the most samples of each.

    `names` are what lm-eval calls them, `folders` hold the YAML files; `bundled` says that some
    task is lm-eval's own. `chat` puts the model's chat template around each question; `fewshot` is
    how many answered ones stand before it (None: as the task has it).
    """

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    limit: int | None
    bundled: bool
    chat: bool = False
    fewshot: int | None = None

    @property
    def digest(self) -> str:
        """Changes with the tasks, the files that make them (`TASK_FILES`, also in folders inside),
        the limit and the harness."""
        from importlib.metadata import version

        settings = (self.names, self.limit, version("lm_eval"), self.chat, self.fewshot)
        total = hashlib.sha256(repr(settings).encode())
        for folder in self.folders:
            made = (file for file in folder.rglob("*") if file.suffix in TASK_FILES)
            for file in sorted(file for file in made if file.is_file()):
                total.update(f"{file.relative_to(folder)}\n".encode())
                with file.open("rb") as handle:
                    total.update(hashlib.file_digest(handle, "sha256").digest())
        return total.hexdigest()


def choose_tasks(
    asked: Sequence[str], limit: int | None, *, chat: bool = False, fewshot: int | None = None
) -> TaskChoice | None:
    """The tasks of `--tasks`; None when none are asked for.

    Raises InputError when lm-eval is not installed, or does not know a name, and for settings of
    tasks without a task.
    """
    if not asked:
        if chat or fewshot is not None:
            raise InputError(
                f"{'--chat' if chat else '--fewshot'} is about lm-eval tasks, and there are none.",
                hint="--tasks gsm8k --chat --fewshot 5",
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
    choice = TaskChoice(tuple(names), tuple(dict.fromkeys(folders)), limit, bundled, chat, fewshot)
    known = set(_manager(choice).all_tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"lm-eval has no task {unknown[0]!r}.",
            hint="lm-eval ls tasks  # their names; or give the YAML file of a task",
            code="validate.unknown_task",
        )
    return choice


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
    being better. `longest` are the network's positions, where they are fewer than `LONGEST`;
    `render` is its chat template. By lm-eval's own backend where the engine has one: then the
    subject is not used again. Raises BackendError when the harness fails."""
    if isinstance(subject, WithHarness):
        asked = {**asdict(choice), "folders": list(map(str, choice.folders))}
        answered = subject.harness(asked)
        if answered is not None:
            return {"results": _numbers(answered["results"]), "samples": _by_sample(answered)}
    import lm_eval

    if choice.chat and render is None:
        raise InputError(
            "--chat: the model has no chat template.",
            hint="leave --chat out",
            code="validate.no_chat_template",
        )
    chat = render if choice.chat else None
    try:
        found = lm_eval.simple_evaluate(
            model=_as_lm(subject, tokenizer, min(LONGEST, longest or LONGEST), chat),
            tasks=list(choice.names),
            task_manager=_manager(choice),
            limit=choice.limit,
            num_fewshot=choice.fewshot,
            apply_chat_template=choice.chat,
            bootstrap_iters=0,
            log_samples=True,
        )
    except QuantkitError:
        raise
    except Exception as error:  # tasks bring code and fetch data: anything may be raised
        first = (str(error).strip().splitlines() or [""])[0]
        raise BackendError(
            f"lm-eval could not run {', '.join(choice.names)}: {type(error).__name__}: {first}",
            hint="run the task with lm-eval alone; it may need its data from the hub",
            code="validate.lm_eval",
        ) from error
    assert found is not None
    return {"results": _numbers(found["results"]), "samples": _by_sample(found)}


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
def _manager(choice: TaskChoice) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=[str(folder) for folder in choice.folders] or None,
        include_defaults=choice.bundled,  # thousands of files to look through
    )


def _as_lm(
    subject: Subject, tokenizer: Tokenizer, longest: int, render: Render | None = None
) -> LM:
    """The subject as lm-eval's model: log-likelihoods, rolling ones, greedy generation.

    With the chat template `render` texts bring their special tokens along.
    """
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
            return [
                _generate(subject, tokenizer, longest, special, *request.args)
                for request in requests
            ]

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


def _generate(
    subject: Subject, tokenizer: Tokenizer, longest: int, special: bool, context: str, settings: Any
) -> str:
    settings = dict(settings)
    if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
        raise InputError(
            "The task samples its answers; only greedy generation can be compared.",
            hint="set do_sample: false in the task's generation_kwargs",
            code="validate.task_samples",
        )
    until = settings.get("until", [])
    stops = [until] if isinstance(until, str) else list(until)
    most = min(int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), longest - 1)
    ids = tokenizer.encode(context, special)[-(longest - most) :]
    text = tokenizer.decode(subject.generate([ids], most)[0])
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
