"""Gates held against metrics: pass, fail, or undecided where the sample is too small to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from quantkit.recipe.gates import TASK_PREFIX, Gate, GateSource, parse_gate
from quantkit.validation.judge.bootstrap import FEWEST, Measured
from quantkit.validation.judge.default_gates import ALWAYS

Verdict = Literal["pass", "fail", "undecided"]

ACCURACY = (
    "ppl_ratio", "kl_mean", "ppl_of_rtn", "kl_of_rtn", "kl_p99", "kl_max", "top1_agreement",
    "routing_agreement", "mcq_drop", "exercise_drop", "canary_failures", "canary_drift",
    "kv_ppl_ratio", "kv_kl", "image_kl_mean", "image_top1_agreement", "image_kl_of_rtn",
    "image_embedding_error",
)  # fmt: skip
"""Metrics that a run without the activations' quantization cannot vouch for, tasks aside."""

WEIGHTS_ONLY = "weights only: the activations that the scheme quantizes were computed in 16 bit"


@dataclass(frozen=True)
class GateResult:
    """One gate and what became of it.

    `source` is what asks for the gate: the scheme's default, the recipe or the command. `measured`
    is false where the metric could not be measured as the gate wants it: such a gate is
    undecided, and does not count as held.
    """

    metric: str
    limit: str
    value: float | None
    interval: tuple[float, float] | None
    verdict: Verdict
    reason: str
    measured: bool
    source: GateSource = "command"

    @property
    def held(self) -> bool:
        """Whether the run may pass: not failed, and not for want of a measurement."""
        return self.verdict != "fail" and self.measured

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def chosen_gates(*layers: Sequence[Gate]) -> list[Gate]:
    """Defaults, the recipe's gates and the command's: of one metric the last one counts."""
    return list({gate.metric: gate for gates in layers for gate in gates}.values())


def accepted(recipe: Sequence[Gate], defaults: Sequence[Gate]) -> tuple[list[Gate], list[str]]:
    """The gates of a checkpoint's own recipe that count, and what to warn of.

    A recipe that comes with the checkpoint may set looser gates than the defaults, but not without
    a word; those of `ALWAYS` it can only tighten.
    """
    always = {parse_gate(text).metric for text in ALWAYS}
    by_metric = {gate.metric: gate for gate in defaults}
    counted, warnings = [], []
    for gate in recipe:
        default = by_metric.get(gate.metric)
        if default is None or not gate.looser(default):
            counted.append(gate)
        elif gate.metric in always:
            warnings.append(f"the recipe's gate {gate} is not held: it is looser than {default}")
        else:
            counted.append(gate)
            warnings.append(f"the recipe's gate {gate} is looser than the default {default}")
    return counted, warnings


def hold(gate: Gate, measured: Measured, *, weights_only: bool) -> GateResult:
    """The verdict of one gate.

    With an interval: pass when all of it keeps the limit, fail when none does, else undecided. NaN
    fails. With `weights_only` accuracy may fail, but not pass.
    """
    verdict, reason, was_measured = _verdict(gate, measured)
    if weights_only and verdict != "fail" and _is_accuracy(gate.metric):
        verdict, reason, was_measured = "undecided", WEIGHTS_ONLY, False
    value = measured.value if measured.value is None or measured.value == measured.value else None
    return GateResult(
        gate.metric,
        f"{gate.direction}{gate.limit:g}",
        value,
        measured.interval,
        verdict,
        reason,
        was_measured,
        gate.source,
    )


def _verdict(gate: Gate, measured: Measured) -> tuple[Verdict, str, bool]:
    value = measured.value
    if value is None:
        return "undecided", measured.why, False
    if value != value:
        return "fail", "not a number: some log-probability is NaN or infinite", True
    if not measured.sampled:
        return ("pass" if _keeps(gate, value) else "fail"), "", True
    if measured.interval is None:
        return "undecided", f"fewer than {FEWEST} samples", True
    ends = [_keeps(gate, end) for end in measured.interval]
    if all(ends):
        return "pass", "", True
    if not any(ends):
        return "fail", "", True
    return "undecided", "the limit lies inside the interval: more --samples would tell", True


def _keeps(gate: Gate, value: float) -> bool:
    return value <= gate.limit if gate.direction == "<=" else value >= gate.limit


def _is_accuracy(metric: str) -> bool:
    return metric in ACCURACY or metric.startswith(TASK_PREFIX)
