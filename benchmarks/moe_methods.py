"""The demo model as a mixture of 4 experts through every method that takes it, proven in vLLM.

    python benchmarks/moe_methods.py WORKDIR [--only NAME …] [--samples 8] [--pictures FOLDER]

Each method makes WORKDIR/NAME; `quantkit validate` holds it against the mixture in 16 bit (its
verify_errors are those of `verify --source`), and vLLM itself scores the same windows. Of a
kind of activations the order must be: 8 bits < 4 bits tuned ≤ 4 bits rounded to nearest, in KL.
What is measured stays in WORKDIR/NAME.json and is not measured again, so that the work can be cut
into pieces; prints the table of all that is there. Ends with 1 where the order is another.
--pictures draws `experts.png`: the tokens that the router sent to each expert, layers × experts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from agreement import G64, SMALL
from methods import quantize

import quantkit
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.upcycle import demo_mixture
from quantkit.cli.output import Output
from quantkit.errors import QuantkitError
from quantkit.validation.ask.data import eval_text
from quantkit.validation.reports.markdown import number, table
from quantkit.validation.reports.plots import experts_figure
from quantkit.validation.run import ValidateRequest, validate
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.engines import opener

BASELINE = "BF16"
METHODS: dict[str, tuple[str, ...]] = {
    "rtn_fp8_dynamic": (),
    "llmcompressor_fp8_dynamic": (),
    "modelopt_fp8": SMALL,
    "llmcompressor_w4a16": (*SMALL, G64),
    "gptqmodel_w4a16": (*SMALL, G64),
    "autoround_w4a16": (*SMALL, G64, "options.iters=5"),
    "rtn_w4a16": (G64,),
    "rtn_nvfp4a16": (),
    "llmcompressor_nvfp4": SMALL,
    "modelopt_nvfp4": SMALL,
    "modelopt_nvfp4_experts_only": SMALL,
}
EIGHT = ("rtn_fp8_dynamic", "llmcompressor_fp8_dynamic", "modelopt_fp8")
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
            quantize(model, name, out, list(METHODS[name]))
        if "predicted" not in found:
            report = quantkit.plan(str(model), method=name, set=METHODS[name], engine="vllm")
            keep("predicted", [verdict.outcome for verdict in report.verdicts])
        if "report" not in found:
            request = ValidateRequest(
                out, str(model), samples=asked_for.samples, throughput=False
            )  # fmt: skip
            keep("report", validate(request, Output()).to_json())
    if "vllm" not in found:
        keep("vllm", in_vllm(out, model, asked_for.samples))
    return found


def in_vllm(path: Path, model: Path, samples: int) -> dict[str, Any]:
    """vLLM's perplexity of the windows of `validate` and its kernels, or why it has none."""
    tokenizer = load_tokenizer(read_tokenizer_info(model))
    windows = eval_text(None, tokenizer, samples, None).windows
    try:
        subject = opener("vllm")(path, Opening())
    except QuantkitError as error:
        return {"refused": error.message.rpartition("failed: ")[2]}
    try:
        loss = -subject.logprobs(windows).mean(dtype=np.float64)
        return {"perplexity": math.exp(loss), "kernels": sorted(subject.kernels())}
    finally:
        subject.close()


def row(name: str, found: dict[str, Any], baseline: float) -> list[str]:
    """A row of the table; `baseline` is vLLM's perplexity of the mixture in 16 bit."""
    document, vllm = found["report"], found["vllm"]
    failed = [gate["metric"] for gate in document["gates"] if gate["verdict"] == "fail"]
    seen = document["checkpoint"].get("experts") or {}
    fewest = [min(counts) for counts in seen.get("seen", {}).values()]
    ratio = number(vllm["perplexity"] / baseline) if "perplexity" in vllm else vllm["refused"]
    return [
        f"`{name}`",
        f"{document['checkpoint']['weight_bytes'] / 1e6:.0f}",
        str(min(fewest)) if fewest else "–",
        *(number(document["metrics"][metric]["value"]) for metric in METRICS),
        ", ".join(failed) or "–",
        ", ".join(found["predicted"]),
        ratio,
    ]


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
    asked_for = parser.parse_args()
    asked_for.work.mkdir(parents=True, exist_ok=True)
    model = demo_mixture()
    baseline = measured(BASELINE, model, asked_for)["vllm"].get("perplexity", math.nan)
    for name in asked_for.only:
        measured(name, model, asked_for)
    kept = {name: asked_for.work / f"{name}.json" for name in METHODS}
    found = {name: json.loads(file.read_text()) for name, file in kept.items() if file.is_file()}
    kl = {name: each["report"]["metrics"]["kl_mean"]["value"] for name, each in found.items()}
    columns = ["method", "MB", "fewest tokens", *METRICS, "fails", "plan", "vLLM ppl_ratio"]
    rows = [row(name, found[name], baseline) for name in sorted(found, key=kl.__getitem__)]
    print("\n".join(table(columns, rows)))
    if asked_for.pictures:
        drawn = (experts_figure(each["report"]) for each in found.values())
        figure = next(figure for figure in drawn if figure)
        asked_for.pictures.mkdir(parents=True, exist_ok=True)
        figure.savefig(asked_for.pictures / "experts.png", dpi=110)
    if wrong := out_of_order(kl):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
