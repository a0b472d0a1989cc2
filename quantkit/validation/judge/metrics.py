"""The metrics of gates, from what was measured: values with intervals over windows or questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.recipe.gates import TASK_PREFIX
from quantkit.validation.ask.canary import Answer
from quantkit.validation.ask.text import BaselineText, QuantizedText
from quantkit.validation.judge.bootstrap import (
    Measured,
    between,
    exact,
    missing,
    percentiles,
    ratio,
    resamples,
    sampled,
)
from quantkit.validation.judge.paired import lost
from quantkit.validation.subjects.base import Spread, Throughput
from quantkit.verification import VerifyReport

Floats = NDArray[np.float64]
NO_LOGITS = "the engine does not give logits"
OF_LOGITS = ("kl_mean", "kl_p99", "kl_max", "top1_agreement")
ROUTING = "routing_agreement"
OF_RTN = ("ppl_of_rtn", "kl_of_rtn")
EXERCISES = "exercise_drop"
OF_CACHE = ("kv_ppl_ratio", "kv_kl", "kv_scale_off")


@dataclass(frozen=True)
class PerWindow:
    """Means over the tokens of each window [n]: what a later report is compared with, in pairs.

    `kl_low` and `kl_high` are the least and the most that `kl` may be, where it is an estimate."""

    nll_baseline: Floats
    nll: Floats
    kl: Floats | None
    agreement: Floats | None
    routing: Floats | None = None
    kl_low: Floats | None = None
    kl_high: Floats | None = None

    @classmethod
    def of(cls, baseline: BaselineText, quantized: QuantizedText) -> PerWindow:
        return cls(
            -_means(baseline.logprobs),
            -_means(quantized.logprobs),
            None if quantized.kl is None else _means(quantized.kl),
            None if quantized.agrees is None else _means(quantized.agrees),
            _worst_routing(quantized),
            *(() if quantized.bounds is None else map(_means, quantized.bounds)),
        )


def perplexity(nll: Floats) -> float:
    """exp of the mean negative log-likelihood of a token, of windows of one length (nats)."""
    return float(np.exp(nll.mean()))


def text_metrics(windows: PerWindow, quantized: QuantizedText) -> dict[str, Measured]:
    """Perplexity ratio, KL and agreement. Where KL is an estimate with bounds, its interval goes
    from the lower end of the one bound's to the upper end of the other's."""
    kl = quantized.kl
    found = {"ppl_ratio": sampled(windows.nll - windows.nll_baseline, np.exp)}
    if windows.kl is None or windows.agreement is None or kl is None:
        absent = missing(NO_LOGITS)
        return found | dict.fromkeys(OF_LOGITS, absent)
    if windows.routing is not None:
        found[ROUTING] = sampled(windows.routing)
    found |= {
        "kl_mean": sampled(windows.kl),
        "kl_p99": _p99(kl),
        "kl_max": Measured(float(kl.max())),  # of this text: an extreme has no interval
        "top1_agreement": sampled(windows.agreement),
    }
    if quantized.bounds is None:
        return found
    low, high = quantized.bounds
    assert windows.kl_low is not None
    assert windows.kl_high is not None
    return found | {
        "kl_mean": between(sampled(windows.kl_low), found["kl_mean"], sampled(windows.kl_high)),
        "kl_p99": between(_p99(low), found["kl_p99"], _p99(high)),
        "kl_max": Measured(float(kl.max()), (float(low.max()), float(high.max())), sampled=True),
    }


def reference_metrics(windows: PerWindow, rounded: PerWindow) -> dict[str, Measured]:
    """The checkpoint beside the baseline rounded to nearest, on the same windows."""
    assert windows.kl is not None
    assert rounded.kl is not None
    return {
        "ppl_of_rtn": sampled(windows.nll - rounded.nll, np.exp),
        "kl_of_rtn": ratio(windows.kl, rounded.kl),
    }


def recovered(windows: PerWindow, rounded: PerWindow) -> dict[str, float | None]:
    """The share of what rounding to nearest loses, in KL and in perplexity, that the checkpoint
    does not; None where rounding loses nothing."""
    assert windows.kl is not None
    assert rounded.kl is not None
    base, ours, theirs = map(perplexity, (windows.nll_baseline, windows.nll, rounded.nll))
    return {
        "kl": _share(float(windows.kl.mean()), float(rounded.kl.mean())),
        "perplexity": _share(ours - base, theirs - base),
    }


def _share(ours: float, rounded: float) -> float | None:
    return 1 - ours / rounded if rounded > 0 else None


def cache_metrics(windows: PerWindow, plain: PerWindow, scales: Floats) -> dict[str, Measured]:
    """The checkpoint beside itself with its key-value cache in 16 bit; `scales` as of
    `CacheAnswers`, of which the middle one counts: a text's largest value varies."""
    assert windows.kl is not None
    assert plain.kl is not None
    middle = float(np.median(scales)) if len(scales) else None
    off = missing("only FP8 scales are held against the text")
    return {
        "kv_ppl_ratio": sampled(windows.nll - plain.nll, np.exp),
        "kv_kl": sampled(windows.kl - plain.kl),
        "kv_scale_off": off if middle is None else exact(max(middle, 1 / middle)),
    }


def routing_by_layer(quantized: QuantizedText) -> dict[int, float]:
    """Decoder layer → share of the tokens that the baseline's experts compute."""
    return {layer: float(same.mean()) for layer, same in quantized.routed.items()}


def _worst_routing(quantized: QuantizedText) -> Floats | None:
    shares = routing_by_layer(quantized)
    return _means(quantized.routed[min(shares, key=shares.__getitem__)]) if shares else None


def choice_metric(baseline: NDArray[np.bool_], quantized: NDArray[np.bool_]) -> Measured:
    """Accuracy lost on the same questions; missing without any."""
    if not len(baseline):
        return missing("the model has no chat template, or its network is too short for answers")
    return lost(baseline.astype(np.float64), quantized.astype(np.float64))


def canary_metrics(
    baseline: Sequence[Answer], quantized: Sequence[Answer], drift: Sequence[float]
) -> dict[str, Measured]:
    """Answers that went wrong, and what the baseline's answers (NaN too) became less likely by."""
    failures = sum(
        bool(ours.problem) and not theirs.problem
        for theirs, ours in zip(baseline, quantized, strict=True)
    )
    return {
        "canary_failures": exact(failures),
        "canary_drift": sampled(np.array(drift, dtype=np.float64)),
    }


def weight_metrics(report: VerifyReport) -> dict[str, Measured]:
    """The worst layer's margin, and the errors of `verify`."""
    margins = [layer.sqnr_db - layer.floor_db for layer in report.layers]
    margin = exact(min(margins)) if margins else missing("no layer was compared with the baseline")
    return {"weight_sqnr_margin": margin, "verify_errors": exact(len(report.errors))}


def speed_metrics(baseline: Throughput | None, quantized: Throughput | None) -> dict[str, Measured]:
    """Ratios of medians; their interval comes from the slowest and fastest repetitions."""
    names = ("prefill_speedup", "decode_speedup", "memory_ratio")
    if baseline is None or quantized is None:
        return dict.fromkeys(names, missing("throughput was not measured"))
    wide = max(row.batch for row in quantized.rows)
    theirs, ours = ({row.batch: row for row in t.rows} for t in (baseline, quantized))
    narrow = min(ours)
    return {
        "prefill_speedup": _ratio(ours[wide].prefill_tokens_s, theirs[wide].prefill_tokens_s),
        "decode_speedup": _ratio(ours[narrow].decode_tokens_s, theirs[narrow].decode_tokens_s),
        "memory_ratio": exact(quantized.memory_bytes / baseline.memory_bytes),
    }


def task_metrics(
    baseline: Mapping[str, Floats], quantized: Mapping[str, Floats]
) -> dict[str, Measured]:
    """TASK.METRIC → values a sample, of both models → what was lost."""
    return {
        f"{TASK_PREFIX}{name}": lost(values, quantized[name]) for name, values in baseline.items()
    }


def _ratio(ours: Spread, theirs: Spread) -> Measured:
    interval = (ours.low / theirs.high, ours.high / theirs.low)
    return Measured(ours.median / theirs.median, interval, sampled=True)


def _means(table: NDArray[np.float32] | NDArray[np.bool_]) -> Floats:
    return np.asarray(table.mean(axis=1, dtype=np.float64))


def _p99(tokens: NDArray[np.float32]) -> Measured:
    """The 99th percentile over all tokens; whole windows are resampled."""
    kl = tokens.astype(np.float64)
    value = float(np.quantile(kl, 0.99))
    if not np.isfinite(value) or len(kl) < 8:
        return Measured(value, sampled=True)
    parts = resamples(len(kl), most=400)  # each sorts every token
    quantiles = [np.quantile(kl[draw], 0.99) for draws in parts for draw in draws]
    return Measured(value, percentiles(np.array(quantiles)), sampled=True)
