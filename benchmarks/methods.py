"""All methods on the demo model with one calibration set: size, quality, time and memory.

Quality is that of the weights: each checkpoint is dequantized into the base model, which then runs
with 16-bit activations on held-out text. Methods that take minutes run on a copy cut to 8 layers,
which the table says; there perplexity is compared with that copy's own. With --against, each 4-bit
method is also run by a plain script of its library, in turn, and the tensors of both must be equal.

    python benchmarks/methods.py [--samples 32] [--length 256] [--only NAME …] [--layers N]
    python benchmarks/methods.py --against [--rounds 3] [--layers N]

With --layers every method runs on a copy cut to N layers. Both print a table in Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from quantkit.calibration import build_tokens, load_calibration
from quantkit.calibration.heldout import held_out_texts
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.cli.methods import method_rows
from quantkit.demo import demo_model
from quantkit.formats.dequantize import dequantize
from quantkit.formats.gguf_file import GgufFile, gguf_in, open_gguf
from quantkit.formats.registry import detect
from quantkit.verify.subject import examine
from tests.helpers import cut_layers

PLAIN = Path(__file__).with_name("plain_methods.py")
TUNING = 20
CUT = 8
G64 = ("group_size=64",)
SETTINGS: dict[str, tuple[str, ...]] = {
    "autoround_w2a16": (f"options.iters={TUNING}",),
    "autoround_w3a16": (*G64, f"options.iters={TUNING}"),
    "autoround_w4a16": (*G64, f"options.iters={TUNING}"),
    "autoround_w8a16": (f"options.iters={TUNING}",),
    "autoround_nvfp4": ("options.iters=0", "options.disable_opt_rtn=true"),
    "autoround_mxfp4": ("options.iters=0", "options.disable_opt_rtn=true"),
    "autoround_gguf_q4_k_m": ("options.disable_opt_rtn=true",),
    "gptqmodel_w4a16": G64,
    "gptqmodel_w3a16": G64,
    "gptqmodel_w2a16": G64,
    "llmcompressor_w4a16": G64,
    "llmcompressor_w4a16_autoround": (*G64, f"options.iters={TUNING}"),
    "modelopt_int4_awq": G64,
    "modelopt_w4a8_awq": G64,
    "rtn_w4a16": G64,
    "msmodelslim_w4a4_dynamic": (f"options.iters={TUNING}",),
}
SLOW = {
    "autoround_w2a16", "autoround_w3a16", "autoround_w4a16", "autoround_w8a16",
    "autoround_gguf_q4_k_m",
    "llmcompressor_w8a8", "llmcompressor_w4a16_autoround", "modelopt_int4_awq",
    "modelopt_w4a8_awq", "msmodelslim_w4a4_dynamic",
}  # fmt: skip
AGAINST = (
    "llmcompressor_w4a16", "llmcompressor_nvfp4", "llmcompressor_mxfp4", "gptqmodel_w4a16",
    "autoround_w4a16", "modelopt_nvfp4",
)  # fmt: skip
WINDOWS, WINDOW = 8, 512


def quantize(model: Path, method: str, out: Path, sets: list[str]) -> tuple[float, dict[str, Any]]:
    """Wall seconds of the command, and the quantkit.json that it wrote."""
    command = [sys.executable, "-m", "quantkit", "quantize", str(model), "--method", method]
    command += ["--out", str(out), "--device", "cpu"]
    start = time.monotonic()
    done = subprocess.run(
        command + [part for change in sets for part in ("--set", change)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split("error: ")[-1].split())[:200])
    wall = time.monotonic() - start
    note: dict[str, Any] = json.loads((out / "quantkit.json").read_text())
    return wall, note


def library_seconds(note: dict[str, Any]) -> float:
    return sum(float(s["seconds"]) for s in note["stages"] if s["name"] != "import")


def dequantized(out: Path, source: Checkpoint) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in 16 bit, by the source's names."""
    if gguf_in(out):
        return from_gguf(open_gguf(out), source)
    checkpoint = open_checkpoint(out)
    subject = examine(checkpoint, detect(checkpoint))
    state = {}
    for name in source.tensors:
        module = name.removesuffix(".weight")
        spec = subject.declaration.layers.get(module)
        if spec is None:
            if name in checkpoint.tensors:
                state[name] = checkpoint.tensor(name)
            continue
        parts = subject.layout.expected(spec)
        held = {s: f"{module}.{s}" for s in parts if f"{module}.{s}" in checkpoint.tensors}
        tensors = {suffix: checkpoint.tensor(full) for suffix, full in held.items()}
        state[name] = dequantize(subject.layout.read(tensors, spec))
    return state


def from_gguf(held: GgufFile, source: Checkpoint) -> dict[str, torch.Tensor]:
    from quantkit.verify.gguf import source_pairs, source_values

    pairs, _ = source_pairs(held, source)
    return {pair.name: source_values(held, pair) for pair in pairs}


class Judge:
    """Perplexity on held-out text, and the mean KL divergence of a model's own distribution."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.source = open_checkpoint(path)
        self.base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.tested = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer(" ".join(held_out_texts()), return_tensors="pt").input_ids[0]
        self.windows = ids[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)

    @torch.no_grad()
    def judge(self, out: Path) -> tuple[float, float, float]:
        """Perplexity of the base, perplexity of `out`, KL(base ‖ out) in nats a token."""
        self.tested.load_state_dict(dequantized(out, self.source), strict=False)
        losses: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        divergence: list[torch.Tensor] = []
        for window in self.windows:
            base, mine = (
                model(window[None]).logits[0, :-1].log_softmax(-1)
                for model in (self.base, self.tested)
            )
            for kept, logits in ((losses, base), (others, mine)):
                kept.append(-logits.gather(1, window[1:, None]).mean())
            divergence.append((base.exp() * (base - mine)).sum(-1).mean())
        first, second = (float(torch.stack(kept).mean().exp()) for kept in (losses, others))
        return first, second, float(torch.stack(divergence).mean())


def table(chosen: argparse.Namespace, base: Path, folder: Path) -> None:
    sets = [f"calibration.samples={chosen.samples}", f"calibration.sequence_length={chosen.length}"]
    print(f"Calibration: {chosen.samples} × {chosen.length} tokens; at most {TUNING} tuning steps.")
    print(f"Held-out text: {WINDOWS} × {WINDOW} tokens; activations in 16 bit.\n")
    print(
        "| method | layers | MB | bits a weight | perplexity (base) | KL | library s | command s "
        "| peak MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    models, judges = {0: base}, {}
    for row in method_rows():
        name = row["method"]
        if chosen.only and name not in chosen.only:
            continue
        if not row["available"]:
            print(f"| {name} | {row['reason']} | | | | | | | |", flush=True)
            continue
        layers = chosen.layers or (CUT if name in SLOW else 0)
        if layers not in models:
            models[layers] = cut_layers(base, folder / f"cut{layers}", layers)
        if layers not in judges:
            judges[layers] = Judge(models[layers])
        judge = judges[layers]
        with tempfile.TemporaryDirectory() as work:
            out = Path(work, "out")
            try:
                more = sets if row["needs"] and "calibration" in row["needs"] else []
                wall, note = quantize(models[layers], name, out, [*more, *SETTINGS.get(name, ())])
            except RuntimeError as error:
                print(f"| {name} | {error} | | | | | | | |", flush=True)
                continue
            plain_model, quantized, divergence = judge.judge(out)
        results, peak = note["results"], note["peak_rss_bytes"] / 2**20
        print(
            f"| {name} | {layers or 'all'} | {results['weight_bytes'] / 1e6:.0f} "
            f"| {results['bits_per_weight']:.2f} | {quantized:.2f} ({plain_model:.2f}) "
            f"| {divergence:.4f} | {library_seconds(note):.1f} | {wall:.1f} | {peak:.0f} |",
            flush=True,
        )


def against(chosen: argparse.Namespace, layers: int, model: Path) -> None:
    """The library stage beside a plain script, median of the rounds, in turn."""
    overrides: dict[str, object] = {"samples": chosen.samples, "sequence_length": chosen.length}
    tokens = build_tokens(load_calibration("default", overrides), model)
    sets = [f"calibration.{key}={value}" for key, value in overrides.items()]
    settings = json.dumps({"batch_size": 8, "group_size": 64, "iters": TUNING})
    print(
        f"{layers} layers, {chosen.samples} × {chosen.length} tokens, median of "
        f"{chosen.rounds}.\n\n| method | plain s | library s | ratio | plain MiB | peak MiB "
        "| ratio | command s | tensors |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in chosen.only or AGAINST:
        runs: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
        walls, equal = [], True
        for number in range(chosen.rounds):
            with tempfile.TemporaryDirectory() as folder:
                places = {key: Path(folder, key) for key in runs}
                for key in list(runs) if number % 2 == 0 else list(runs)[::-1]:
                    if key == "plain":
                        runs[key].append(plain(name, model, tokens.path, places[key], settings))
                        continue
                    wall, note = quantize(
                        model, name, places[key], [*sets, *SETTINGS.get(name, ())]
                    )
                    walls.append(wall)
                    runs[key].append((library_seconds(note), note["peak_rss_bytes"]))
                made = next(places["plain"].rglob("config.json")).parent
                equal &= (
                    open_checkpoint(made).digests() == open_checkpoint(places["ours"]).digests()
                )
        (base, base_peak), (mine, peak) = (
            (median(run[0] for run in runs[key]), median(run[1] for run in runs[key]))
            for key in runs
        )
        print(
            f"| {name} | {base:.1f} | {mine:.1f} | {mine / base:.2f} | {base_peak / 2**20:.0f} "
            f"| {peak / 2**20:.0f} | {peak / base_peak:.2f} | {median(walls):.1f} "
            f"| {'equal' if equal else 'differ'} |",
            flush=True,
        )


def plain(name: str, model: Path, tokens: Path, out: Path, settings: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, str(PLAIN), name, str(model), str(tokens), str(out), settings],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return told["seconds"], told["peak_rss_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--against", action="store_true")
    parser.add_argument("--only", nargs="*")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.against:
            layers = chosen.layers or CUT
            against(chosen, layers, cut_layers(demo_model(), Path(folder, "cut"), layers))
        else:
            table(chosen, demo_model(), Path(folder))


if __name__ == "__main__":
    main()
