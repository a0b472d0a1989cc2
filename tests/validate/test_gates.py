"""Gates: how they are written, held and decided."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.network.parameters import active_parameters
from quantkit.errors import InputError
from quantkit.recipe.gates import METRICS, Gate, outcome, parse_gate
from quantkit.validation.judge.bootstrap import (
    LEVEL,
    PART_INDICES,
    RESAMPLES,
    Measured,
    exact,
    missing,
    ratio,
    resamples,
    sampled,
)
from quantkit.validation.judge.chosen import askable
from quantkit.validation.judge.default_gates import (
    BY_BITS,
    OF_RTN,
    PARAMETERS,
    default_gates,
)
from quantkit.validation.judge.metrics import PerWindow, choice_metric, recovered, task_metrics
from quantkit.validation.judge.paired import lost, score_interval
from quantkit.validation.judge.verdicts import accepted, chosen_gates, hold
from quantkit.validation.reports.report import Report

PPL = Gate("ppl_ratio", "<=", 1.02)


@pytest.mark.parametrize("text", ["ppl_ratio<=1.02", " ppl_ratio  <= 1.02 "])
def test_gate_is_read(text: str) -> None:
    assert parse_gate(text) == PPL
    assert str(PPL) == "ppl_ratio<=1.02"


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("ppl_ratio", "is not METRIC<=NUMBER"),
        ("ppl_ratio<1", "is not METRIC<=NUMBER"),
        ("ppl_ratio<=nan", "is not METRIC<=NUMBER"),
        ("ppl<=1.02", "names no metric: ppl. Did you mean ppl_ratio?"),
        ("ppl_ratio>=1.02", "must be written with <="),
        ("top1_agreement<=0.9", "must be written with >="),
        ("drop.facts.acc>=0", "must be written with <="),
    ],
)
def test_gate_that_cannot_be_held_is_refused(text: str, telling: str) -> None:
    with pytest.raises(InputError, match="gate") as caught:
        parse_gate(text)
    assert telling in caught.value.message


def test_gates_of_a_recipe_are_checked() -> None:
    recipe = load_recipe("rtn_w8a16", ("gates+=ppl_ratio <= 1.1",))
    assert recipe.gates == ["ppl_ratio<=1.1"]
    with pytest.raises(InputError, match="must be written with"):
        load_recipe("rtn_w8a16", ("gates+=ppl_ratio >= 1.1",))


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((1.0, 1.01), "pass"), ((1.03, 1.05), "fail"), ((1.0, 1.03), "undecided")],
)
def test_verdict_follows_the_interval(interval: tuple[float, float], verdict: str) -> None:
    value = sum(interval) / 2
    result = hold(PPL, Measured(value, interval, sampled=True), weights_only=False)
    assert result.verdict == verdict
    assert result.held == (verdict != "fail")


def test_verdicts_without_interval() -> None:
    few = sampled(np.zeros(7), np.exp)
    assert hold(PPL, few, weights_only=False).verdict == "undecided"
    assert hold(PPL, exact(1.5), weights_only=False).verdict == "fail"
    absent = hold(PPL, missing("no logits"), weights_only=False)
    assert (absent.verdict, absent.held, absent.reason) == ("undecided", False, "no logits")


def test_the_outcome_in_words_says_what_was_left_open() -> None:
    assert outcome(True, 0) == "every gate held"
    assert outcome(True, 2) == "no gate failed, 2 undecided"
    assert outcome(False, 2) == "not good"
    report = Report({}, {}, {}, {}, [])
    absent = hold(PPL, missing("no logits"), weights_only=False)
    report.gates = [hold(PPL, sampled(np.zeros(7), np.exp), weights_only=False)]
    assert (report.ok, report.undecided) == (True, 1)
    report.gates.append(absent)
    assert (report.ok, report.undecided) == (False, 1)


def test_nan_fails() -> None:
    result = hold(PPL, sampled(np.array([0.0, np.nan] * 8), np.exp), weights_only=False)
    assert (result.verdict, result.value) == ("fail", None)


def test_weights_only_run_cannot_pass_an_accuracy_gate_but_can_fail_one() -> None:
    good, bad = (sampled(np.full(16, value), np.exp) for value in (0.0, 1.0))
    result = hold(PPL, good, weights_only=True)
    assert (result.verdict, result.held) == ("undecided", False)
    assert "weights only" in result.reason
    assert hold(PPL, bad, weights_only=True).verdict == "fail"
    margin = parse_gate("weight_sqnr_margin>=0")
    assert hold(margin, exact(3.0), weights_only=True).verdict == "pass"


def test_resamples_are_drawn_in_parts_and_are_always_the_same() -> None:
    parts = list(resamples(60_000, most=100))
    assert max(part.size for part in parts) <= PART_INDICES
    assert sum(map(len, parts)) == 100
    assert np.array_equal(parts[0], next(resamples(60_000)))
    whole = np.random.default_rng(0).integers(0, 10_000, (2000, 10_000))
    assert np.array_equal(np.concatenate(list(resamples(10_000))), whole)


def interval_end(values: np.typing.NDArray[np.float64]) -> float:
    interval = sampled(values).interval
    assert interval is not None
    return interval[1]


@pytest.mark.parametrize("count", [8, 33, 500])
def test_interval_of_a_mean_is_that_of_scipy(count: int) -> None:
    values = np.random.default_rng(count).lognormal(-4, 1, count)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert sampled(values).interval == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    ratio = sampled(values, np.exp).interval
    assert ratio == pytest.approx((np.exp(theirs.low), np.exp(theirs.high)), rel=1e-9)
    less = sampled(values, np.negative).interval
    assert less == pytest.approx((-theirs.high, -theirs.low), rel=1e-9)


def test_a_few_hard_windows_raise_the_upper_end() -> None:
    rng = np.random.default_rng(0)
    missed = sum(interval_end(rng.lognormal(-4, 1, 32)) < np.exp(-3.5) for _ in range(400))
    assert missed <= 45  # percentile intervals end too low 55 times


def test_interval_holds_the_truth_as_often_as_it_says_and_narrows_with_samples() -> None:
    rng = np.random.default_rng(0)
    held, widths = [], []
    for count in (32, 512):
        for _ in range(100):
            interval = sampled(rng.normal(0.01, 0.02, count), np.exp).interval
            assert interval is not None
            held.append(interval[0] < np.exp(0.01) < interval[1])
            widths.append(interval[1] - interval[0])
    assert 0.88 < np.mean(held) < 0.99
    assert np.mean(widths[100:]) < np.mean(widths[:100]) / 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_few_right_or_wrong_answers_that_agree_decide_nothing(share: float) -> None:
    gate = parse_gate("drop.gsm8k.exact_match<=0.03")
    for count, verdict in ((8, "undecided"), (96, "undecided"), (374, "pass")):
        same = (np.arange(count) < share * count).astype(float)
        metric = task_metrics({"gsm8k.exact_match": same}, {"gsm8k.exact_match": same})
        result = hold(gate, metric[gate.metric], weights_only=False)
        assert result.verdict == verdict
        assert result.interval is not None
        assert result.interval[1] == pytest.approx(3.8415 / (count + 3.8415), rel=1e-3)
        assert result.interval[0] == pytest.approx(-result.interval[1])


def test_facts_and_inverted_metrics_are_answers_too() -> None:
    facts = choice_metric(np.ones(12, dtype=bool), np.ones(12, dtype=bool))
    assert facts.interval is not None
    assert facts.interval[1] > 0.2
    errors, fewer = -np.ones(16), -np.array([1.0, 0.0] * 8)
    less = lost(errors, fewer)
    assert less.value == -0.5
    assert less.interval is not None
    assert -0.9 < less.interval[0] < -0.5 < less.interval[1] < 0
    assert lost(np.full(16, 0.25), np.zeros(16)).interval == (0.25, 0.25)  # no answers: bootstrap
    assert lost(np.ones(7), np.ones(7)).interval is None


@pytest.mark.parametrize(("count", "worse", "better"), [(40, 0.2, 0.05), (100, 0.02, 0.01)])
def test_the_interval_of_answers_holds_the_truth(count: int, worse: float, better: float) -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        draw = rng.random(count)
        more, fewer = int((draw < worse).sum()), int((draw > 1 - better).sum())
        low, high = score_interval(more, fewer, count)
        held.append(low <= worse - better <= high)
    assert 0.93 < np.mean(held) < 0.995


def test_defaults_are_those_of_the_narrowest_weights_and_the_last_gate_counts() -> None:
    gates = {gate.metric: gate.limit for gate in default_gates({"w8a8_dynamic", "w4a16"})}
    assert gates["ppl_ratio"] == parse_gate(BY_BITS[4][1]).limit
    chosen = chosen_gates(default_gates({"w4a16"}), [PPL], [parse_gate("ppl_ratio<=1.5")])
    assert [gate.limit for gate in chosen if gate.metric == "ppl_ratio"] == [1.5]


@pytest.mark.parametrize(
    ("schemes", "bits"),
    [({"Q8_0"}, 8), ({"Q6_K", "Q8_0"}, 4), ({"Q5_0"}, 4), ({"Q4_K", "Q6_K"}, 4), ({"Q3_K"}, 3),
     ({"IQ2_XXS"}, 2), ({"TQ1_0"}, 2), ({"fp8_e4m3_channel"}, 8), ({"int4_group"}, 4),
     ({"nameless"}, 8), (set(), 8)],
)  # fmt: skip
def test_bits_are_read_from_names_of_ggml_and_of_unknown_schemes(
    schemes: set[str], bits: int
) -> None:
    assert {str(gate) for gate in default_gates(schemes)} >= set(BY_BITS[bits])


@pytest.mark.parametrize(
    ("scheme", "chosen", "limit"),
    [("fp8_dynamic", 2, 0.72), ("w4a16", 2, 0.46), ("fp8_dynamic", 8, 0.27), ("w4a16", 1, 0.68)],
)
def test_more_experts_a_token_agree_less(scheme: str, chosen: int, limit: float) -> None:
    gates = {gate.metric: gate.limit for gate in default_gates({scheme}, chosen)}
    assert gates["routing_agreement"] == limit
    assert "routing_agreement" not in {gate.metric for gate in default_gates({scheme})}


def test_a_recipe_loosens_a_default_only_with_a_warning_and_never_the_integrity() -> None:
    defaults = default_gates({"w8a8_dynamic"})
    texts = ["ppl_ratio<=1e9", "weight_sqnr_margin>=-1e9", "kl_mean<=0.01", "kl_p99<=2",
             "verify_errors<=0", "weight_sqnr_margin>=3"]  # fmt: skip
    counted, warnings = accepted([parse_gate(text, "recipe") for text in texts], defaults)
    assert [gate.metric for gate in counted] == [
        "ppl_ratio", "kl_mean", "kl_p99", "verify_errors", "weight_sqnr_margin",
    ]  # fmt: skip
    assert warnings == [
        "the recipe's gate ppl_ratio<=1e+09 is looser than the default ppl_ratio<=1.05",
        "the recipe's gate weight_sqnr_margin>=-1e+09 is not held: it is looser than "
        "weight_sqnr_margin>=0",
    ]
    chosen = chosen_gates(defaults, counted, [parse_gate("mcq_drop<=0.5")])
    sources = {g.metric: (g.limit, g.source) for g in chosen}
    assert sources["ppl_ratio"] == (1e9, "recipe")
    assert sources["weight_sqnr_margin"] == (3, "recipe")
    assert sources["canary_failures"] == (0, "default")
    assert sources["mcq_drop"] == (0.5, "command")
    assert hold(chosen[0], exact(9.0), weights_only=False).to_json()["source"] == "recipe"


def test_every_default_gate_is_of_a_known_metric() -> None:
    assert OF_RTN.keys() == BY_BITS.keys()
    for bits in BY_BITS:
        texts = (*BY_BITS[bits], *OF_RTN[bits])
        assert {parse_gate(text).metric for text in texts} <= METRICS.keys()


def test_a_larger_model_may_lose_less() -> None:
    small, demo, large, mixture = (
        {gate.metric: gate.limit for gate in default_gates({"w4a16"}, parameters=count)}
        for count in (10**7, PARAMETERS, 8 * PARAMETERS, 64 * PARAMETERS)
    )
    assert small == demo == {g.metric: g.limit for g in default_gates({"w4a16"})}
    assert demo["ppl_ratio"] == 1.6
    assert [large[m] for m in ("ppl_ratio", "kl_mean", "canary_drift")] == [1.3, 0.25, 0.4]
    assert [mixture[m] for m in ("ppl_ratio", "kl_mean")] == [1.15, pytest.approx(0.12, abs=0.01)]
    same = {"kl_of_rtn", "ppl_of_rtn", "mcq_drop", "canary_failures", "weight_sqnr_margin"}
    assert all(demo[metric] == large[metric] for metric in same)


def test_idle_experts_compute_no_token() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (100, 8), "model.layers.0.mlp.gate.weight": (4, 8),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 8, 8),
        "model.layers.0.mlp.shared_experts.up_proj.weight": (8, 8),
    }  # fmt: skip
    dense = 800 + 32 + 256 + 64
    assert active_parameters(shapes, {"model_type": "llama"}) == dense
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1}
    assert active_parameters(shapes, config) == dense - 192


def test_the_ratio_of_two_means_has_the_interval_of_pairs() -> None:
    rng = np.random.default_rng(0)
    hard = rng.lognormal(-1, 1, 32)
    same = ratio(hard, hard)
    assert (same.value, same.interval) == (1.0, (1.0, 1.0))
    half = ratio(hard * rng.normal(0.5, 0.02, 32), hard)
    assert half.interval is not None
    assert 0.48 < half.interval[0] < 0.5 < half.interval[1] < 0.52  # hard windows are hard for both
    assert ratio(hard[:7], hard[:7]).interval is None
    assert ratio(hard, 0 * hard).why == "rounding to nearest loses nothing here"
    gate = parse_gate("kl_of_rtn<=1.15")
    assert hold(gate, ratio(np.nan * hard, hard), weights_only=False).verdict == "fail"
    assert hold(gate, ratio(hard * 1.3, hard), weights_only=False).verdict == "fail"


def test_what_is_recovered_of_the_loss_of_rounding() -> None:
    def windows(nll: float, kl: float) -> PerWindow:
        return PerWindow(np.zeros(8), np.full(8, np.log(nll)), np.full(8, kl), None)

    rounded, tuned = windows(1.4, 0.4), windows(1.1, 0.1)
    assert recovered(tuned, rounded) == {
        "kl": pytest.approx(0.75), "perplexity": pytest.approx(0.75)
    }  # fmt: skip
    assert recovered(rounded, rounded) == {"kl": 0.0, "perplexity": 0.0}
    assert recovered(tuned, windows(1.0, 0.0)) == {"kl": None, "perplexity": None}


def test_an_engine_is_not_held_to_default_gates_of_what_it_does_not_show() -> None:
    gates = chosen_gates(default_gates(["w4a16"]), [parse_gate("kl_p99<=2", "recipe")])
    assert askable(gates, "builtin") == (gates, [])
    left, notes = askable(gates, "vllm")
    gone = {gate.metric for gate in gates} - {gate.metric for gate in left}
    assert gone == {"kl_of_rtn", "ppl_of_rtn"}
    assert notes == [
        "kl_of_rtn and ppl_of_rtn are not gated: vllm cannot hold the baseline rounded to nearest",
    ]
    asked = chosen_gates(gates, [parse_gate("kl_of_rtn<=1")])
    assert parse_gate("kl_of_rtn<=1") in askable(asked, "vllm")[0]
