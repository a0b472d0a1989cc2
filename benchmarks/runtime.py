"""The builtin runtime on a CPU against vLLM, Transformers and itself in BF16.

    python benchmarks/runtime.py WORKDIR PART … [--rounds 3] [--vllm-python PYTHON]

PART is one of

    vllm     prefill and decode, batch 1 and 8, on the demo model, against vLLM's CPU engine
    kernels  INT8 prefill, INT4 and INT8 decode of a random 1.1 B Llama against BF16
    text     perplexity and KL of the demo model against a loop over Transformers' module
    load     loading a quantized checkpoint and one forward pass, against Transformers

Sides take turns within one run; figures are medians, ratios quantkit ÷ the other side (rates: more
is better; seconds and memory: less is). WORKDIR keeps the checkpoints, 7 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_llama import make

from quantkit.backends.environments.managed import ready
from quantkit.checkpoint.demo import demo_model
from quantkit.runtime.load import load
from quantkit.runtime.model import Runtime

BATCHES = (1, 8)
PROMPT, NEW = 256, 17
PAUSE = 0.5
LOAD = """
import sys, time
from pathlib import Path
import torch
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
before, start = status("VmRSS:"), time.perf_counter()
if sys.argv[1] == "quantkit":
    from quantkit.runtime.load import load
else:
    from transformers import AutoModelForCausalLM
    import compressed_tensors
    load = AutoModelForCausalLM.from_pretrained
model = load(sys.argv[2])
with torch.inference_mode():
    model(torch.arange(3, 11)[None])
print(time.perf_counter() - start, status("VmHWM:") - before)
"""
"""A child's seconds until a first forward pass is done, and the MiB that it took at most.

Without the pass Transformers has mapped the files and read nothing. The imports count on both
sides: each imports Transformers, one before `load` and one, for the config, within it.
"""

Timer = Callable[[], float]


def quantized(source: Path, root: Path, method: str, *settings: str) -> Path:
    """A checkpoint made by one of our methods, kept in `root`."""
    out = root / f"{source.name}-{method}"
    if not out.exists():
        command = [sys.executable, "-m", "quantkit", "quantize", str(source)]
        command += ["--method", method, "--out", str(out)]
        for setting in settings:
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def in_turn(rounds: int, *sides: Timer) -> list[float]:
    """Median seconds of each side; one round first that does not count.

    A pause comes before each: threads of the other side's process spin for a while after its work.
    """
    for side in sides:
        side()
    times = [[after_a_pause(side) for side in sides] for _ in range(rounds)]
    return [median(column) for column in zip(*times, strict=True)]


def after_a_pause(side: Timer) -> float:
    time.sleep(PAUSE)
    return side()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_ids(model: Runtime, batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, length))


@contextmanager
def vllm(python: Path, checkpoint: Path) -> Iterator[Callable[[int, int, int], float]]:
    """A vLLM engine: (batch, prompt, new tokens) → seconds of that generation."""
    worker = Path(__file__).with_name("plain_vllm.py")
    with subprocess.Popen(
        [str(python), str(worker), str(checkpoint)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    ) as engine:  # fmt: skip

        def generate(batch: int, prompt: int, new: int) -> float:
            assert engine.stdin
            assert engine.stdout
            print(batch, prompt, new, file=engine.stdin, flush=True)
            return float(engine.stdout.readline())

        try:
            yield generate
        finally:
            engine.kill()


def against_vllm(root: Path, rounds: int, python: Path, methods: list[str]) -> None:
    demo = demo_model()
    checkpoints = {
        "BF16": lambda: demo,
        "W8A8": lambda: quantized(demo, root, "rtn_w8a8_dynamic"),
        "W4A16": lambda: quantized(demo, root, "rtn_w4a16", "group_size=64"),
        "FP8": lambda: quantized(demo, root, "rtn_fp8_dynamic"),
    }
    print("| demo model, tokens/s | batch | vLLM | quantkit | ratio |\n|---|---|---|---|---|")
    for name in methods or checkpoints:
        path = checkpoints[name]()
        with vllm(python, path) as theirs:
            model = load(path)

            def ours(batch: int, prompt: int, new: int, model: Runtime = model) -> float:
                ids = random_ids(model, batch, prompt)
                return seconds(lambda: model.generate(ids, max_new_tokens=new, eos_token_id=[]))

            for batch in BATCHES:
                sides = [
                    lambda side=side, new=new: side(batch, PROMPT, new)  # noqa: B023
                    for new in (1, NEW)
                    for side in (theirs, ours)
                ]
                first_theirs, first_ours, all_theirs, all_ours = in_turn(rounds, *sides)
                prefill = [batch * PROMPT / s for s in (first_theirs, first_ours)]
                rest = [all_theirs - first_theirs, all_ours - first_ours]
                decode = [batch * (NEW - 1) / s for s in rest]
                for what, (a, b) in {"prefill": prefill, "decode": decode}.items():
                    print(f"| {name} {what} | {batch} | {a:.1f} | {b:.1f} | {b / a:.2f} |")


def against_bf16(root: Path, rounds: int) -> None:
    source = root / "llama-1.1b"
    if not source.exists():
        make(source, "1.1")
    plain = load(source)
    print("| random 1.1 B Llama | BF16 | quantized | faster by |\n|---|---|---|---|")
    for method, what in {
        "rtn_w8a8_dynamic": "prefill", "rtn_w4a16": "decode", "rtn_w8a16": "decode"
    }.items():  # fmt: skip
        model = load(quantized(source, root, method))
        sides = [_prefill, _decode][what == "decode"]
        slow, fast = in_turn(rounds, sides(plain), sides(model))
        print(f"| {method} {what} | {slow:.3f} s | {fast:.3f} s | {slow / fast:.2f} |")


def _prefill(model: Runtime) -> Timer:
    ids = random_ids(model, 1, 1024)
    return lambda: seconds(lambda: model(ids, logits_to_keep=1))


def _decode(model: Runtime, steps: int = 8) -> Timer:
    ids = random_ids(model, 1, 64)
    cache: Any = model.network.new_cache(1, 64 + steps + 1)

    def run() -> float:
        cache.length = 0
        model(ids, past_key_values=cache, logits_to_keep=1)
        following = ids[:, :1]
        return median(
            seconds(lambda: model(following, past_key_values=cache, logits_to_keep=1))
            for _ in range(steps)
        )

    return run


def against_transformers_text(rounds: int) -> None:
    """The same metric over both modules: windows of 512, the baseline's logits kept."""
    from transformers import AutoModelForCausalLM

    path = demo_model()
    theirs: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ours = load(path)
    ids = random_ids(ours, 8, 512)
    with torch.inference_mode():
        baseline = ours(ids).logits[:, :-1].float().log_softmax(-1).bfloat16()

    @torch.inference_mode()
    def measured(model: Any) -> None:
        for row, kept in zip(ids, baseline, strict=True):
            scores = model(row[None]).logits[0, :-1].float().log_softmax(-1)
            scores.gather(-1, row[1:, None]).mean()
            wanted = kept.float()
            (wanted.exp() * (wanted - scores)).sum(-1).mean()

    slow, fast = in_turn(
        rounds, lambda: seconds(lambda: measured(theirs)), lambda: seconds(lambda: measured(ours))
    )
    print(
        f"perplexity and KL: Transformers {ids.numel() / slow:.0f} tokens/s, "
        f"quantkit {ids.numel() / fast:.0f}, ratio {slow / fast:.2f}"
    )


def against_transformers_load(root: Path, rounds: int) -> None:
    source = root / "llama-1.1b"
    if not source.exists():
        make(source, "1.1")
    print("| load | Transformers | quantkit | time | memory |\n|---|---|---|---|---|")
    for method in ("rtn_w8a8_dynamic", "rtn_w4a16"):
        path = quantized(source, root, method)
        found: dict[str, list[list[float]]] = {"transformers": [], "quantkit": []}
        for _ in range(rounds):
            for side, rows in found.items():
                done = subprocess.run(
                    [sys.executable, "-c", LOAD, side, str(path)],
                    check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                )  # fmt: skip
                rows.append([float(number) for number in done.stdout.split()])
        (slow, big), (fast, small) = (
            [median(column) for column in zip(*rows, strict=True)] for rows in found.values()
        )
        print(
            f"| {method} | {slow:.1f} s, {big:.0f} MiB | {fast:.1f} s, {small:.0f} MiB "
            f"| {fast / slow:.2f} | {small / big:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("parts", nargs="+", choices=["vllm", "kernels", "text", "load"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--checkpoints", nargs="*", default=[], help="of BF16 W8A8 W4A16 FP8")
    chosen = parser.parse_args()
    chosen.workdir.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))
    if "vllm" in chosen.parts:
        python = chosen.vllm_python or ready("vllm")
        if python is None:
            sys.exit("quantkit env create vllm")
        against_vllm(chosen.workdir, chosen.rounds, python, chosen.checkpoints)
    if "kernels" in chosen.parts:
        against_bf16(chosen.workdir, chosen.rounds)
    if "text" in chosen.parts:
        against_transformers_text(chosen.rounds)
    if "load" in chosen.parts:
        against_transformers_load(chosen.workdir, chosen.rounds)


if __name__ == "__main__":
    main()
