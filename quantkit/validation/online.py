"""The third column: the baseline as an engine's own flag would quantize it while it loads.

Is the checkpoint better than what `--quantization fp8` gives for nothing? The same windows and
facts are asked, and the two are compared in pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from quantkit.backends.process.job import Reporter
from quantkit.engines import NAMES
from quantkit.engines.online import Online
from quantkit.validation.ask.questions import (
    BaselineAnswers,
    QuantizedAnswers,
    Questions,
    ask_text_and_facts,
)
from quantkit.validation.judge.bootstrap import Measured, sampled
from quantkit.validation.judge.metrics import PerWindow, choice_metric, perplexity, text_metrics
from quantkit.validation.subjects.base import Subject

Outcome = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class OnlineResult:
    """What the online method gives beside the checkpoint.

    emulated: whether the builtin runtime rounded the weights, where an engine was not asked.
    metrics: as the checkpoint's own. less: what the checkpoint has less of, nats a token: of KL
    where the engine gives logits, else of the loss; `offline` says what that means for it.
    """

    method: str
    engine: str
    scheme: str
    emulated: bool
    kernels: dict[str, int]
    notes: list[str]
    perplexity: float
    mcq_accuracy: float
    metrics: dict[str, Measured]
    of: Literal["kl", "loss"]
    less: Measured
    offline: Outcome

    @property
    def title(self) -> str:
        """ "vLLM's fp8, emulated"."""
        return f"{NAMES[self.engine]}'s {self.method}" + (", emulated" if self.emulated else "")

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        what = {
            "better": "is better than",
            "worse": "is worse than",
            "undecided": "cannot be told from",
        }[self.offline]
        value = 0.0 if self.less.value is None else self.less.value
        kind = "KL" if self.of == "kl" else "loss"
        return f"the checkpoint {what} {self.title} ({kind} {-value:+.4f} nats a token)"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "title": self.title, "sentence": self.sentence}


def ask_online(
    online: Online,
    subject: Subject,
    questions: Questions,
    theirs: BaselineAnswers,
    ours: QuantizedAnswers,
    ui: Reporter,
) -> OnlineResult:
    """Ask the rounded baseline, and compare the checkpoint's answers with its."""
    text, facts = ask_text_and_facts(subject, questions, theirs, f"online {online.name}", ui)
    windows, offline = PerWindow.of(theirs.text, text), PerWindow.of(theirs.text, ours.text)
    of: Literal["kl", "loss"] = "loss"
    more = windows.nll - offline.nll
    if windows.kl is not None and offline.kl is not None:
        of, more = "kl", windows.kl - offline.kl
    less = sampled(more)
    return OnlineResult(
        method=online.name,
        engine=online.engine,
        scheme=online.scheme.name,
        emulated=subject.name == "builtin",
        kernels=subject.kernels(),
        notes=list(subject.notes),
        perplexity=perplexity(windows.nll),
        mcq_accuracy=float(facts.mean()),
        metrics={**text_metrics(windows, text), "mcq_drop": choice_metric(theirs.facts, facts)},
        of=of,
        less=less,
        offline=_outcome(less),
    )


def _outcome(less: Measured) -> Outcome:
    if less.interval is None or less.interval[0] <= 0 <= less.interval[1]:
        return "undecided"
    return "better" if less.interval[0] > 0 else "worse"
