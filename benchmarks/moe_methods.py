"""The demo model as a mixture of 4 experts through every method that takes it, proven in vLLM.

    python benchmarks/moe_methods.py WORKDIR [--only NAME …] [--samples 8] [--pictures FOLDER]
                                             [--layers N] [--no-vllm] [--validate]
                                             [--device cuda]

Each method makes WORKDIR/NAME, which is verified against the mixture in 16 bit; the runtime
measures the metrics of `quantkit validate` on held-out text and holds its gates. With --validate
the whole command does (on a CPU chat and facts take minutes); --device calibrates and validates on
a GPU. vLLM scores the same windows of text. In KL 8 bits must be under 4 bits tuned, and these not
above 4 bits rounded to nearest. What is measured stays in WORKDIR/NAME.json and is not measured
again, so that the work can be cut into pieces; prints the table of all that is there, and ends with
1 where the order is another. --pictures draws `experts.png`: the tokens that the router sent to
each expert, layers × experts.
With --layers the mixture is cut to N layers: it models no language, so that only KL says something.
With --no-vllm the last column is left for another run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from agreement import G64, SMALL
from methods import quantize
from moe import mixture
from numpy.typing import NDArray

import quantkit
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.network.parameters import active_parameters
from quantkit.checkpoint.upcycle import ACTIVE
from quantkit.errors import QuantkitError
from quantkit.validation.ask.data import eval_text
from quantkit.validation.ask.text import BaselineText, measure_baseline, measure_quantized
from quantkit.validation.judge.default_gates import default_gates
from quantkit.validation.judge.metrics import PerWindow, text_metrics, weight_metrics
from quantkit.validation.judge.verdicts import hold
from quantkit.validation.reports.markdown import number, table
from quantkit.validation.reports.plots import experts_figure
from quantkit.validation.run import ValidateRequest, validate
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.engines import opener
from tests.support.in_process import Quiet

BASELINE = "BF16"
METHODS: dict[str, tuple[str, ...]] = {
    "rtn_w8a8_dynamic": (),
    "rtn_fp8_dynamic": (),
    "llmcompressor_fp8_dynamic": (),
    "modelopt_fp8": SMALL,
    "msmodelslim_w8a8": SMALL,
    "msmodelslim_w8a8_dynamic": (),
    "llmcompressor_w4a16": (*SMALL, G64),
    "gptqmodel_w4a16": (*SMALL, G64),
    "autoround_w4a16": (
        "calibration.samples=16",
        "calibration.sequence_length=64",
        G64,
        "options.iters=30",
    ),
    "rtn_w4a16": (G64,),
    "rtn_nvfp4a16": (),
    "llmcompressor_nvfp4": SMALL,
    "modelopt_nvfp4": SMALL,
    "modelopt_nvfp4_experts_only": SMALL,
}
EIGHT = (
    "rtn_w8a8_dynamic", "rtn_fp8_dynamic", "llmcompressor_fp8_dynamic", "modelopt_fp8",
    "msmodelslim_w8a8_dynamic",
)  # fmt: skip
"""Without `msmodelslim_w8a8`: inputs of several layers hold values that are hundreds of times the
others, and INT8 with one static scale a tensor has few steps left for these."""
TUNED = ("llmcompressor_w4a16", "gptqmodel_w4a16", "autoround_w4a16")
ROUNDED = ("rtn_w4a16",)
METRICS = ("ppl_ratio", "kl_mean", "top1_agreement", "routing_agreement", "weight_sqnr_margin",
           "verify_errors")  # fmt: skip


def measured(name: str, model: Path, asked_for: argparse.Namespace) -> dict[str, Any]:
    """What WORKDIR/NAME.json has, with what it lacks."""
    kept = asked_for.work / f"{name}.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}

    def keep(key: str, value: Any) -> None:
        found[key] = value
        kept.write_text(json.dumps(found))
        print(f"{name}: {key}", file=sys.stderr, flush=True)

    out = model if name == BASELINE else asked_for.work / name
    if name != BASELINE:
        if not out.is_dir():
            quantize(model, name, out, list(METHODS[name]), asked_for.device)
        if "predicted" not in found:
            report = quantkit.plan(str(model), method=name, set=METHODS[name], engine="vllm")
            keep("predicted", [verdict.outcome for verdict in report.verdicts])
        if "metrics" not in found:
            keep("metrics", held_against(out, model, asked_for))
        if asked_for.validate and "validated" not in found:
            keep("validated", validated(out, model, asked_for))
    if "vllm" not in found and not asked_for.no_vllm:
        keep("vllm", in_vllm(out, model, asked_for.samples))
    return found


def held_against(out: Path, model: Path, asked_for: argparse.Namespace) -> dict[str, Any]:
    """The metrics of a checkpoint, and the default gates that they fail."""
    integrity = quantkit.verify(out, source=model)
    windows = windows_of(model, asked_for.samples)
    file = asked_for.work / f"{BASELINE}.npz"
    if not file.is_file():
        with closing(opener("builtin")(model, Opening())) as subject:
            said = measure_baseline(subject, windows, None)
        np.savez(file, **{name: value for name, value in vars(said).items() if value is not None})
    baseline = BaselineText(**np.load(file))
    with closing(opener("builtin")(out, Opening())) as subject:
        ours = measure_quantized(subject, windows, baseline, None)
        weights_only = subject.weights_only
        kernels = subject.kernels()
    metrics = {
        **text_metrics(PerWindow.of(baseline, ours), ours),
        **weight_metrics(integrity),
    }  # fmt: skip
    gates = default_gates({layer.scheme for layer in integrity.layers}, ACTIVE, computing(model))
    results = [
        hold(gate, metrics[gate.metric], weights_only=weights_only)
        for gate in gates
        if gate.metric in metrics
    ]
    return {
        **{name: metrics[name].value for name in METRICS},
        "fails": [result.metric for result in results if result.verdict == "fail"],
        "undecided": [result.metric for result in results if result.verdict == "undecided"],
        "kernels": kernels,
    }


def computing(model: Path) -> int:
    """Parameters that compute a token, by which the gates of `validate` shrink."""
    source = open_checkpoint(model)
    return active_parameters(source.shapes, source.config)


def validated(out: Path, model: Path, asked_for: argparse.Namespace) -> dict[str, Any]:
    """Every metric of `quantkit validate`, and which gates it fails or does not decide, chat and
    facts among them.

    A cut copy answers nothing, and is measured nevertheless.
    """
    request = ValidateRequest(
        out, str(model), device=asked_for.device, samples=asked_for.samples, throughput=False,
        broken_baseline=asked_for.layers is not None,
    )  # fmt: skip
    found = validate(request, Quiet())
    gates = {
        verdict: [gate.metric for gate in found.gates if gate.verdict == verdict]
        for verdict in ("pass", "fail", "undecided")
    }
    return {**gates, "metrics": {name: metric.value for name, metric in found.metrics.items()}}


def windows_of(model: Path, samples: int) -> NDArray[np.int64]:
    tokenizer = load_tokenizer(read_tokenizer_info(model))
    return eval_text(None, tokenizer, samples, None).windows


def in_vllm(path: Path, model: Path, samples: int) -> dict[str, Any]:
    """vLLM's perplexity of the windows of `validate` and its kernels, or why it has none."""
    windows = windows_of(model, samples)
    try:
        subject = opener("vllm")(path, Opening())
    except QuantkitError as error:
        return {"refused": error.message.rpartition("failed: ")[2]}
    try:
        loss = -subject.logprobs(windows).mean(dtype=np.float64)
        return {"perplexity": math.exp(loss), "kernels": sorted(subject.kernels())}
    finally:
        subject.close()


def row(name: str, found: dict[str, Any], work: Path, baseline: float) -> list[str]:
    """A row of the table; `baseline` is vLLM's perplexity of the mixture in 16 bit."""
    note, metrics, vllm = note_of(work / name), found["metrics"], found.get("vllm", {})
    fewest = (note.get("experts") or {}).get("min")
    ratio = number(vllm["perplexity"] / baseline) if "perplexity" in vllm else "–"
    return [
        f"`{name}`",
        f"{note['results']['weight_bytes'] / 1e6:.0f}",
        "–" if fewest is None else str(fewest),
        *(number(metrics[metric]) for metric in METRICS),
        ", ".join(metrics["fails"]) or "–",
        ", ".join(found["predicted"]),
        ratio,
    ]


def of_validate(found: dict[str, Any] | None) -> str:
    """What the whole command says: gates that fail, or how many hold and which are undecided."""
    if found is None:
        return "–"
    undecided = f", undecided: {', '.join(found['undecided'])}" if found["undecided"] else ""
    return ", ".join(found["fail"]) or f"{len(found['pass'])} hold{undecided}"


def note_of(out: Path) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((out / "quantkit.json").read_text())
    return note


def out_of_order(kl: dict[str, float]) -> list[str]:
    """Pairs of methods whose KL is in the wrong order."""
    pairs = [(low, high, False) for low in EIGHT for high in (*TUNED, *ROUNDED)]
    pairs += [(low, high, True) for low in TUNED for high in ROUNDED]
    return [
        f"{low} ({kl[low]:.4f}) is not under {high} ({kl[high]:.4f})"
        for low, high, equal in pairs
        if low in kl and high in kl and not (kl[low] < kl[high] or (equal and kl[low] == kl[high]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--device", default="cpu")
    asked_for = parser.parse_args()
    asked_for.work.mkdir(parents=True, exist_ok=True)
    model = mixture(asked_for.work, asked_for.layers)
    baseline = measured(BASELINE, model, asked_for).get("vllm", {}).get("perplexity", math.nan)
    for name in asked_for.only:
        try:
            measured(name, model, asked_for)
        except RuntimeError as refused:
            print(f"{name}: {refused}", file=sys.stderr)
    kept = {name: asked_for.work / f"{name}.json" for name in METHODS}
    found = {name: json.loads(file.read_text()) for name, file in kept.items() if file.is_file()}
    found = {name: each for name, each in found.items() if "metrics" in each}
    kl = {name: each["metrics"]["kl_mean"] for name, each in found.items()}
    columns = ["method", "MB", "fewest tokens", *METRICS, "fails", "plan", "vLLM ppl_ratio"]
    if asked_for.validate:
        columns.append("validate")
    ordered = sorted(found, key=kl.__getitem__)
    rows = [row(name, found[name], asked_for.work, baseline) for name in ordered]
    if asked_for.validate:
        rows = [
            [*each, of_validate(found[name].get("validated"))]
            for name, each in zip(ordered, rows, strict=True)
        ]
    print("\n".join(table(columns, rows)))
    for name in ordered:
        if why := found[name].get("vllm", {}).get("refused"):
            print(f"\nvLLM does not run {name}: {why}")
    if asked_for.pictures:
        notes = (note_of(asked_for.work / name) for name in found)
        drawn = (experts_figure({"checkpoint": note}) for note in notes)
        figure = next(figure for figure in drawn if figure)
        asked_for.pictures.mkdir(parents=True, exist_ok=True)
        figure.savefig(asked_for.pictures / "experts.png", dpi=110)
    if wrong := out_of_order(kl):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
