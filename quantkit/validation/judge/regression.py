"""A report against an earlier one of the same recipe: what moved, and whether that is noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import InputError
from quantkit.recipe.gates import direction_of
from quantkit.validation.judge.bootstrap import FEWEST, Measured, sampled
from quantkit.validation.judge.paired import lost

Moved = Literal["same", "noise", "undecided", "better", "worse"]

_SAME: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("recipe", ("checkpoint", "recipe_digest")),
    ("method", ("checkpoint", "method")),
    ("baseline", ("baseline", "fingerprint")),
    ("text", ("text", "digest")),
    ("engine", ("engine", "name")),
    ("kernel", ("engine", "kernel")),
)
"""What two reports must agree in to be compared: its name, and where it stands."""

TOLERANCE: dict[str, float] = {
    "ppl_ratio": 0.002, "kl_mean": 0.002, "kl_p99": 0.02, "top1_agreement": 0.005,
    "routing_agreement": 0.01, "ppl_of_rtn": 0.002, "kl_of_rtn": 0.02,
    "kv_ppl_ratio": 0.002, "kv_kl": 0.002, "kv_scale_off": 0.1,
    "image_kl_mean": 0.002, "image_top1_agreement": 0.005, "image_kl_of_rtn": 0.02,
    "image_embedding_error": 0.001,
    "mcq_drop": 0.01, "exercise_drop": 0.02, "canary_drift": 0.01, "weight_sqnr_margin": 0.5,
    "canary_failures": 0.0,
    "verify_errors": 0.0, "prefill_speedup": 0.1, "decode_speedup": 0.1, "memory_ratio": 0.01,
}  # fmt: skip
"""Changes up to this size are not worth a red build, however sure they are."""
_TASK_TOLERANCE = 0.01
_NOT_COMPARED = frozenset({"kl_max"})
"""The extreme of a sample says nothing of two samples."""


@dataclass(frozen=True)
class Change:
    """How one metric moved since the earlier report.

    `delta` is new - old, `interval` its 95 % interval where it can be had. "noise": the interval
    holds 0, or the change is within the metric's tolerance. "undecided": there are too few samples
    for an interval. A value that is NaN or infinite is worse than any other.
    """

    metric: str
    old: float
    new: float
    delta: float
    interval: tuple[float, float] | None
    verdict: Moved


def refuse_incomparable(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """InputError when the reports are not of the same recipe, baseline, text and engine.

    Of the new one its `checkpoint`, `baseline`, `text` and `engine` are enough.
    """
    for what, (part, key) in _SAME:
        before, now = old.get(part, {}).get(key), new.get(part, {}).get(key)
        if before != now:
            raise InputError(
                f"The earlier report is of another {what}: {_short(before)}, not {_short(now)}.",
                hint="--against with a report of the same recipe, baseline, text and engine",
                code="validate.incomparable",
            )


def compare(
    metrics: Mapping[str, Measured], new: Mapping[str, Any], old: Mapping[str, Any]
) -> list[Change]:
    """Every metric that both reports measured; `metrics` are those of the new one.

    Windows and questions are compared in pairs, other metrics by their intervals.
    """
    changes = []
    for name, measured in metrics.items():
        before = old["metrics"].get(name, {})
        value = _value(before)
        if name in _NOT_COMPARED or value is None or measured.value is None:
            continue
        paired = _paired(name, new, old)
        interval = paired.interval if paired else _difference(measured, before.get("interval"))
        delta = measured.value - value
        moved = _moved(name, value, measured, interval)
        changes.append(Change(name, value, measured.value, delta, interval, moved))
    return changes


def no_longer_measured(metrics: Mapping[str, Measured], old: Mapping[str, Any]) -> list[str]:
    """Metrics that the earlier report has a value of and this run has none."""
    return [
        name
        for name, before in old["metrics"].items()
        if _value(before) is not None and (name not in metrics or metrics[name].value is None)
    ]


def _value(metric: Mapping[str, Any]) -> float | None:
    """The value of a metric in a report: NaN where it is null without a reason, as `to_json` writes
    what is no number; None where it was not measured."""
    value = metric.get("value")
    return nan if value is None and metric.get("why") == "" else value


def _moved(
    name: str, old: float, measured: Measured, interval: tuple[float, float] | None
) -> Moved:
    assert measured.value is not None
    if not (isfinite(old) and isfinite(measured.value)):
        if isfinite(old) == isfinite(measured.value):
            return "same"
        return "worse" if isfinite(old) else "better"
    delta = measured.value - old
    if delta == 0:
        return "same"
    held_by_0 = interval is not None and interval[0] <= 0 <= interval[1]
    if held_by_0 or abs(delta) <= TOLERANCE.get(name, _TASK_TOLERANCE):
        return "noise"
    if interval is None and measured.sampled:
        return "undecided"
    return "worse" if (delta > 0) == (direction_of(name) == "<=") else "better"


def _paired(name: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> Measured | None:
    """The difference on the same windows or questions; None for other metrics."""
    places = {
        "ppl_ratio": ("windows", "nll"),
        "kl_mean": ("windows", "kl"),
        "top1_agreement": ("windows", "agreement"),
        "routing_agreement": ("windows", "routing"),
        "image_kl_mean": ("images", "kl"),
        "image_top1_agreement": ("images", "agreement"),
        "mcq_drop": ("right", "quantized"),
    }
    if name not in places:
        return None
    part, key = places[name]
    ours, theirs = (_array((one.get(part) or {}).get(key)) for one in (new, old))
    if ours is None or theirs is None or len(ours) != len(theirs) or len(ours) < FEWEST:
        return None
    if name == "mcq_drop":
        return lost(theirs, ours)
    differences = ours - theirs
    if name != "ppl_ratio":
        return sampled(differences)
    ratio = old["metrics"]["ppl_ratio"]["value"]
    return sampled(differences, lambda mean: ratio * np.expm1(mean))


def _difference(new: Measured, old: list[float] | None) -> tuple[float, float] | None:
    """The widest difference of two intervals; None where a side has none."""
    if new.interval is None or old is None:
        return None
    return new.interval[0] - old[1], new.interval[1] - old[0]


def _array(values: list[float] | None) -> NDArray[np.float64] | None:
    return None if values is None else np.array(values, dtype=np.float64)


def _short(value: Any) -> str:
    text = str(value)
    return text[:16] if len(text) == 64 else text
