"""The builtin runtime and a real engine on one checkpoint: the same perplexity, the same answers?

Both get the same token ids: windows of held-out text, and the canary's prompts for greedy answers.
Where an answer differs, the gap is how far apart the two tokens of the first difference are (nats)
in the builtin runtime with float32 activations: bfloat16 rounds logits of 16 to 32 to steps of
0.125, so that a gap of that size is a tie which rounding decides.

    python benchmarks/agreement.py WORKDIR [--only NAME …] [--windows N] [--layers N]

Quantizes the demo model (or its first N layers) into WORKDIR by every method of `METHODS` that is
not there yet, and prints a table in Markdown. `BF16` is the demo model itself.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.demo import demo_model
from quantkit.errors import QuantkitError
from quantkit.runtime import load
from quantkit.validate.builtin import Builtin
from quantkit.validate.canary import canary_prompts
from quantkit.validate.data import eval_text
from quantkit.validate.engines import opener
from quantkit.validate.subject import Opening, Subject
from tests.helpers import cut_layers

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


def asked(
    engine: str, path: Path, windows: np.ndarray, prompts: Sequence[Sequence[int]]
) -> tuple[float, list[list[int]], str, Subject]:
    """Perplexity, greedy answers, the kernels, and the subject, still open."""
    subject = opener(engine)(path, Opening())
    perplexity = float(np.exp(-subject.logprobs(windows).mean(dtype=np.float64)))
    answers = subject.generate(prompts, NEW_TOKENS)
    return perplexity, answers, ", ".join(sorted(subject.kernels())), subject


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
        "same answers",
        "gap",
        "kernels",
    )
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.only:
        path = quantized(name, model, options.work)
        ours, said, _, builtin = asked("builtin", path, windows, prompts)
        try:
            theirs, heard, kernels, subject = asked(engine, path, windows, prompts)
        except QuantkitError as error:
            print(f"| {name} | {ours:.3f} | does not load: {error.message} | | | | |", flush=True)
            builtin.close()
            continue
        subject.close()
        pairs = [trio for trio in zip(prompts, said, heard, strict=True) if trio[1] != trio[2]]
        builtin.close()
        exact = Builtin(load(path, device="cpu", dtype="float32"), 0.0)
        gaps = [gap(exact, *trio) for trio in pairs]
        same = f"{len(prompts) - len(pairs)} of {len(prompts)}"
        widest = f"{max(gaps):.3f}" if gaps else "–"
        print(
            f"| {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.4f} | {same} | {widest} "
            f"| {kernels} |",
            flush=True,
        )
        (options.work / "agreement.jsonl").open("a").write(
            json.dumps({"name": name, "builtin": ours, engine: theirs, "gaps": gaps}) + "\n"
        )


if __name__ == "__main__":
    main()
