"""The builtin runtime and a real engine on one checkpoint: the same perplexity, the same answers?

Both get the same token ids: windows of held-out text, and the canary's prompts for greedy answers.
The judge is the builtin runtime with float32 activations. An `error` is the mean distance of a
runtime's log-probabilities of the text from the judge's (nats): the smaller one is nearer the
truth. Where an answer differs, the gap is how far apart the judge holds the two tokens of the first
difference. 99 in 100 log-probabilities of the builtin runtime are within `noise` of the judge's:
a gap, being of two of them, is within rounding up to twice that; a larger one asks for a look.

    python benchmarks/agreement.py WORKDIR [--only NAME …] [--windows N] [--layers N]

Quantizes the demo model (or its first N layers) into WORKDIR by every method of `METHODS` that is
not there yet, and prints a table in Markdown. `BF16` is the demo model itself.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.demo import demo_model
from quantkit.errors import QuantkitError
from quantkit.runtime.load import load
from quantkit.validation.ask.canary import canary_prompts
from quantkit.validation.ask.data import eval_text
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import Builtin
from quantkit.validation.subjects.engines import opener
from tests.support.helpers import cut_layers

SMALL = ("calibration.samples=16", "calibration.sequence_length=256")
G64 = "group_size=64"
ASYM = "symmetric=false"
METHODS: dict[str, tuple[str, ...]] = {
    "BF16": (),
    "rtn_fp8_dynamic": (),
    "rtn_w8a8_dynamic": (),
    "rtn_w8a16": (),
    "rtn_w4a16 g64": (G64,),
    "rtn_w4a16 g32": ("group_size=32",),
    "rtn_w4a16 g64 asym": (G64, ASYM),
    "rtn_w4a16 g32 asym": ("group_size=32", ASYM),
    "rtn_w4a16 gptq": (G64, "options.layout=gptq"),
    "rtn_w4a16 awq": (G64, ASYM, "options.layout=awq"),
    "rtn_fp8_block": (),
    "rtn_nvfp4a16": (),
    "rtn_mxfp4a16": (),
    "rtn_mxfp8": (),
    "llmcompressor_fp8_dynamic": (),
    "llmcompressor_fp8": SMALL,
    "llmcompressor_w8a8": SMALL,
    "llmcompressor_w4a16": (*SMALL, G64),
    "llmcompressor_nvfp4": SMALL,
    "gptqmodel_w4a16": (*SMALL, G64),
    "gptqmodel_w8a16": SMALL,
    "autoround_w4a16": (*SMALL, G64, "options.iters=5"),
    "autoround_w8a16": (*SMALL, "options.iters=5"),
    "modelopt_fp8": SMALL,
    "modelopt_int8_sq": SMALL,
}
"""A name is a method and what tells its variants apart; then its settings."""

NEW_TOKENS = 16


def quantized(name: str, model: Path, work: Path) -> Path:
    """The checkpoint of one row, made unless it is there."""
    if name == "BF16":
        return model
    out = work / name.replace(" ", "_")
    if not out.is_dir():
        sets = [part for setting in METHODS[name] for part in ("--set", setting)]
        command = [sys.executable, "-m", "quantkit", "quantize", str(model), "--method"]
        done = subprocess.run(
            [*command, name.split()[0], "--out", str(out), *sets],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-600:]}")
    return out


class Heard(NamedTuple):
    """What a runtime says of one checkpoint: `logprobs` [windows, length - 1], greedy answers."""

    logprobs: NDArray[np.float32]
    answers: list[list[int]]
    kernels: str

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.logprobs.mean(dtype=np.float64)))


def asked(
    engine: str, path: Path, windows: NDArray[np.int64], prompts: Sequence[Sequence[int]]
) -> Heard:
    subject = opener(engine)(path, Opening())
    try:
        logprobs = subject.logprobs(windows)
        answers = subject.generate(prompts, NEW_TOKENS)
        return Heard(logprobs, answers, ", ".join(sorted(subject.kernels())))
    finally:
        subject.close()


def gap(exact: Builtin, prompt: Sequence[int], ours: list[int], theirs: list[int]) -> float:
    """How far apart the tokens are in which two answers first differ."""
    pairs = zip(ours, theirs, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    if same == min(len(ours), len(theirs)):  # one goes on where the other has ended
        return 0.0
    rows = np.array([[*prompt, *ours[:same], answer[same]] for answer in (ours, theirs)])
    last = exact.logprobs(rows)[:, -1]
    return abs(float(last[0] - last[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--engine", default="vllm")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = demo_model()
    if options.layers:
        cut = options.work / f"demo_{options.layers}_layers"
        model = cut if cut.is_dir() else cut_layers(model, cut, options.layers)
    tokenizer = load_tokenizer(read_tokenizer_info(model))
    windows = eval_text(None, tokenizer, options.windows, None).windows
    _, prompts = canary_prompts(model, tokenizer)
    engine = options.engine
    print(f"{windows.size} tokens of held-out text; {len(prompts)} greedy answers\n")
    columns = (
        "checkpoint",
        "builtin ppl",
        f"{engine} ppl",
        "ratio",
        "builtin error",
        f"{engine} error",
        "same answers",
        "gap",
        "noise",
        "kernels",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name in options.only:
        path = quantized(name, model, options.work)
        try:
            theirs = asked(engine, path, windows, prompts)
        except QuantkitError as error:
            print(f"| {name} | does not load in {engine}: {error.message} |", flush=True)
            continue
        ours = asked("builtin", path, windows, prompts)
        judge = Builtin(load(path, device="cpu", dtype="float32"), 0.0)
        exact = judge.logprobs(windows)
        far = np.abs(ours.logprobs - exact)
        trios = zip(prompts, ours.answers, theirs.answers, strict=True)
        gaps = [gap(judge, *trio) for trio in trios if trio[1] != trio[2]]
        judge.close()
        cells = (
            name,
            f"{ours.perplexity:.3f}",
            f"{theirs.perplexity:.3f}",
            f"{theirs.perplexity / ours.perplexity:.4f}",
            f"{far.mean():.4f}",
            f"{np.abs(theirs.logprobs - exact).mean():.4f}",
            f"{len(prompts) - len(gaps)} of {len(prompts)}",
            f"{max(gaps):.3f}" if gaps else "–",
            f"{np.quantile(far, 0.99):.3f}",
            theirs.kernels,
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
