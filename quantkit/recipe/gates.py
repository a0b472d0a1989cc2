"""Gates: a metric and the limit that it must keep, as recipes and `--gate` write them.

The defaults are in `validation/judge/default_gates.py`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Literal

from quantkit.errors import InputError

Direction = Literal["<=", ">="]
GateSource = Literal["default", "recipe", "command"]

METRICS: dict[str, tuple[Direction, str]] = {
    "ppl_ratio": ("<=", "perplexity, quantized / baseline"),
    "kl_mean": ("<=", "KL(baseline‖quantized) of the next token, mean, in nats"),
    "ppl_of_rtn": ("<=", "perplexity, quantized / rounded to nearest in the same formats"),
    "kl_of_rtn": ("<=", "kl_mean, quantized / rounded to nearest in the same formats"),
    "kl_p99": ("<=", "the 99th percentile of the KL over tokens"),
    "kl_max": ("<=", "the largest KL of a token"),
    "top1_agreement": (">=", "share of tokens where both put the same one first"),
    "routing_agreement": (">=", "share of tokens with the baseline's experts, in the worst layer"),
    "image_kl_mean": ("<=", "kl_mean of the words that follow a picture"),
    "image_top1_agreement": (">=", "top1_agreement on the words that follow a picture"),
    "image_kl_of_rtn": ("<=", "image_kl_mean, quantized / rounded to nearest"),
    "image_embedding_error": ("<=", "relative error of the embeddings that pictures become"),
    "kv_ppl_ratio": ("<=", "perplexity, with the KV cache quantized / in 16 bit"),
    "kv_kl": ("<=", "kl_mean, with the KV cache quantized - in 16 bit"),
    "kv_scale_off": ("<=", "factor between the middle KV scale and what the text asks for"),
    "mcq_drop": ("<=", "accuracy lost on four-choice facts"),
    "exercise_drop": ("<=", "accuracy lost on written answers that a rule checks"),
    "canary_failures": ("<=", "degenerate chat answers where the baseline's is not"),
    "canary_drift": ("<=", "log-likelihood that the baseline's chat answers lose, nats a token"),
    "weight_sqnr_margin": (">=", "worst layer's weight SQNR over its scheme's floor, in dB"),
    "verify_errors": ("<=", "errors that quantkit verify --source BASELINE finds"),
    "prefill_speedup": (">=", "prefill tokens/s, quantized / baseline, at the largest batch"),
    "decode_speedup": (">=", "decode tokens/s, quantized / baseline, at batch 1"),
    "memory_ratio": ("<=", "memory of the loaded weights, quantized / baseline"),
}
"""Metric → the direction of its gate, and what it is."""

TASK_PREFIX = "drop."
"""`drop.TASK.METRIC`: what the quantized model loses in a metric of an lm-eval task."""

_GATE = re.compile(r"\s*([\w.\-]+)\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Gate:
    """`metric` must be at most ("<=") or at least (">=") `limit`; `source` is who asks for it."""

    metric: str
    direction: Direction
    limit: float
    source: GateSource = field(default="command", compare=False)

    def __str__(self) -> str:
        return f"{self.metric}{self.direction}{self.limit:g}"

    def looser(self, other: Gate) -> bool:
        """Whether something that fails `other`, a gate of the same metric, could keep this one."""
        return self.limit > other.limit if self.direction == "<=" else self.limit < other.limit


def direction_of(metric: str) -> Direction:
    """The direction in which a known metric, or that of a task, is gated."""
    return "<=" if metric.startswith(TASK_PREFIX) else METRICS[metric][0]


def parse_gate(text: str, source: GateSource = "command") -> Gate:
    """`ppl_ratio<=1.02` as a gate; InputError for another form, metric or direction."""
    match = _GATE.fullmatch(text)
    limit = _number(match.group(3)) if match else None
    if match is None or limit is None:
        raise _refusal(f"The gate {text!r} is not METRIC<=NUMBER or METRIC>=NUMBER.")
    metric, direction = match.group(1), match.group(2)
    if metric not in METRICS and not metric.startswith(TASK_PREFIX):
        close = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.4)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise _refusal(f"The gate {text!r} names no metric: {metric}.{meant}")
    wanted = direction_of(metric)
    if direction != wanted:
        raise _refusal(f"The gate {text!r} must be written with {wanted}.")
    return Gate(metric, wanted, limit, source)


def outcome(ok: bool, undecided: int) -> str:
    """What became of all gates, in words; `undecided` counts those that the sample left open."""
    if not ok:
        return "not good"
    return f"no gate failed, {undecided} undecided" if undecided else "every gate held"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if value != value else value


def _refusal(message: str) -> InputError:
    return InputError(
        message,
        hint=f"for example --gate 'ppl_ratio<=1.02'; metrics: {', '.join(METRICS)}, "
        f"{TASK_PREFIX}TASK.METRIC",
        code="gate.invalid",
    )
