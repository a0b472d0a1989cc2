"""The head of a model card, in the Hub's own format (`huggingface_hub`): read, written, added to.

`huggingface_hub` is imported where it is used, so that commands without a card start sooner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.checkpoint.directory import Checkpoint

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_HEAD = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", re.MULTILINE | re.DOTALL)
"""A card's head as the Hub's library finds it; to import that for reading alone takes longer than
to plan."""

DATASETS = "quantkit-"
"""How the `dataset_type` of every result of ours begins: what a later validation replaces."""


def front_matter(source: Checkpoint) -> dict[str, Any]:
    """The YAML head of the source model's README, empty when there is none that can be read."""
    card = source.path / "README.md"
    if not card.is_file():
        return {}
    block = _HEAD.match(card.read_text(encoding="utf-8-sig", errors="replace").lstrip())
    try:
        head = yaml.safe_load(block[1]) if block else None
    except (yaml.YAMLError, ValueError):
        return {}
    if not isinstance(head, dict) or not all(isinstance(key, str) for key in head):
        return {}
    return head | {"language": _language(head["language"])} if "language" in head else head


def header(data: Mapping[str, Any]) -> str:
    """`data` as the head of a card, in its order, with the lines of dashes around it."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**data).to_yaml(original_order=list(data))}\n---"


def with_results(card: str, found: Mapping[str, Any]) -> str:
    """The card with what a validation measured in its head (`model-index`), instead of what an
    earlier one did; others' results stay.

    A head that the Hub's library would write differently, as one with comments, stays as it is.
    """
    from huggingface_hub import ModelCard

    try:
        parsed = ModelCard(card)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        return card
    if parsed.content != card:
        return card
    old = parsed.data.get("eval_results", [])
    kept = [result for result in old if not str(result.dataset_type).startswith(DATASETS)]
    parsed.data["eval_results"] = [*kept, *_results(found)]
    titles = (line[2:] for line in parsed.text.splitlines() if line.startswith("# "))
    parsed.data["model_name"] = parsed.data.get("model_name") or next(titles, "model")
    return str(parsed.content)


def _results(found: Mapping[str, Any]) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    text, values = found["text"], found["values"]
    only = " (weights only)" if found["engine"]["weights_only"] else ""
    args = {"windows": text["windows"], "length": text["length"]}
    of_text = ("text", text["name"], args)
    for (kind, dataset, asked), metric, title, value in (
        (of_text, "perplexity", "perplexity", values["perplexity"]["quantized"]),
        (of_text, "kl_divergence", "KL divergence from the baseline, mean, in nats",
         found["metrics"]["kl_mean"]["value"]),
        (("facts", "four-choice facts", None), "accuracy", "accuracy",
         values["mcq_accuracy"]["quantized"]),
    ):  # fmt: skip
        if value is not None and math.isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=f"{DATASETS}{kind}",
                dataset_name=dataset,
                dataset_args=asked,
                metric_type=metric,
                metric_name=f"{title}{only}",
                metric_value=round(value, 4),
            )


def _language(said: object) -> object:
    """YAML 1.1 reads the code of Norwegian, `no`, as false."""
    if isinstance(said, list):
        return [_language(one) for one in said]
    return "no" if said is False else said
