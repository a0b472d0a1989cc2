"""All methods on the demo model with one calibration set: size, quality, time and memory.

Quality is that of the weights (see quality.py): activations stay in float32. Methods that take
minutes run on a copy cut to 8 layers, which the table says; such a copy no longer models language,
so that its perplexity says little and its KL divergence is what to read. With --against, each
4-bit method is also run by a plain script of its library (plain_methods.py), in turn; the library's
part is compared with that script, and where their tensors differ, so is their quality.

    python benchmarks/methods.py [--samples 32] [--length 256] [--only NAME …] [--layers N]
                                 [--keep FOLDER]
    python benchmarks/methods.py --against [--rounds 3] [--only NAME …] [--layers N]

With --layers every method runs on a copy cut to N layers; --keep leaves the checkpoints in FOLDER,
named after their methods. Both print a table in Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from quality import WINDOW, WINDOWS, Judge

from quantkit.backends.environments.managed import ready
from quantkit.calibration import build_tokens, load_calibration
from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.gguf import gguf_in, open_gguf
from quantkit.cli.methods import method_rows
from tests.support.helpers import cut_layers

PLAIN = Path(__file__).with_name("plain_methods.py")
TUNING = 20
CUT = 8
G64 = ("group_size=64",)
TUNED = (f"options.iters={TUNING}",)
SETTINGS: dict[str, tuple[str, ...]] = {
    "autoround_w2a16": TUNED,
    "autoround_w3a16": (*G64, *TUNED),
    "autoround_w4a16": (*G64, *TUNED),
    "autoround_w8a16": TUNED,
    "autoround_nvfp4": TUNED,
    "autoround_mxfp4": TUNED,
    "gptqmodel_w4a16": G64,
    "gptqmodel_w3a16": G64,
    "gptqmodel_w2a16": G64,
    "llmcompressor_w4a16": G64,
    "llmcompressor_w4a16_autoround": (*G64, *TUNED),
    "modelopt_int4_awq": G64,
    "modelopt_w4a8_awq": G64,
    "rtn_w4a16": G64,
    "msmodelslim_w4a4_dynamic": TUNED,
}
SLOW = {
    "autoround_w2a16", "autoround_w3a16", "autoround_w4a16", "autoround_w8a16", "autoround_nvfp4",
    "autoround_mxfp4", "autoround_gguf_q4_k_m", "llmcompressor_w8a8",
    "llmcompressor_w4a16_autoround", "msmodelslim_w4a4_dynamic",
}  # fmt: skip
AGAINST = (
    "llmcompressor_w4a16", "llmcompressor_w4a16_autoround", "llmcompressor_nvfp4",
    "llmcompressor_nvfp4a16", "llmcompressor_mxfp4", "gptqmodel_w4a16", "autoround_w4a16",
    "autoround_nvfp4", "autoround_mxfp4", "autoround_gguf_q4_k_m", "modelopt_nvfp4",
    "modelopt_nvfp4_mlp_only", "modelopt_int4_awq", "modelopt_w4a16_nvfp4", "modelopt_w4a8_awq",
    "msmodelslim_w4a8_dynamic", "msmodelslim_w4a4_dynamic",
)  # fmt: skip
TUNING_IN_PLAIN = {"autoround_gguf_q4_k_m": 0}
"""Tuning steps of the plain script where they are not TUNING: the recipe's own."""


@dataclass(frozen=True)
class Measured:
    """One run: seconds of the library from loading to saving, those of all processors, seconds of
    the whole command, peak of resident bytes, and the quantkit.json, empty for a plain script."""

    library: float
    processors: float
    command: float
    peak: int
    note: dict[str, Any]


def quantize(model: Path, method: str, out: Path, sets: list[str], device: str = "cpu") -> Measured:
    command = [sys.executable, "-m", "quantkit", "quantize", str(model), "--method", method]
    command += ["--out", str(out), "--device", device]
    start = time.monotonic()
    done = subprocess.run(
        command + [part for change in sets for part in ("--set", change)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split("error: ")[-1].split())[:300])
    wall = time.monotonic() - start
    note = json.loads((out / "quantkit.json").read_text())
    stages = [stage for stage in note["stages"] if stage["name"] != "import"]
    library = sum(float(stage["seconds"]) for stage in stages)
    processors = sum(float(stage.get("cpu_seconds", 0)) for stage in stages)
    return Measured(library, processors, wall, note["peak_rss_bytes"], note)


def plain(name: str, model: Path, tokens: Path, out: Path) -> Measured:
    managed = ready("msmodelslim") if name.startswith("msmodelslim") else None
    settings = {
        "batch_size": 8, "group_size": 64, "iters": TUNING_IN_PLAIN.get(name, TUNING),
        "practice": practice(name),
    }  # fmt: skip
    command = [str(managed or sys.executable), str(PLAIN), name, str(model), str(tokens), str(out)]
    start = time.monotonic()
    done = subprocess.run(
        [*command, json.dumps(settings)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    told = json.loads(done.stdout.strip().splitlines()[-1])
    wall = time.monotonic() - start
    return Measured(told["seconds"], told["cpu_seconds"], wall, told["peak_rss_bytes"], {})


def practice(name: str) -> dict[str, Any]:
    """msModelSlim's configuration of a method."""
    element, method = ("int4", "autoround") if "w4a4" in name else ("int8", "minmax")
    layers = {
        "qconfig": {
            "act": {"scope": "per_token", "dtype": element, "symmetric": True, "method": "minmax"},
            "weight": {
                "scope": "per_channel", "dtype": "int4", "symmetric": True, "method": method,
            },
        },
        "include": ["*_proj"],
    }  # fmt: skip
    tuned = {"type": "autoround_quant", "iters": TUNING, "strategies": [layers]}
    step = tuned if method == "autoround" else {"type": "linear_quant", **layers}
    save = [{"type": "ascendv1_saver", "part_file_size": 5}]
    spec = {"runner": "model_wise", "process": [step], "save": save}
    return {"apiversion": "modelslim_v1", "spec": spec}


def for_transformers_4(model: Path, target: Path) -> Path:
    """The model with a config that msModelSlim's Transformers reads right."""
    target.mkdir()
    config = json.loads((model / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(model / "model.safetensors")
    return target


def table(chosen: argparse.Namespace, base: Path, folder: Path) -> None:
    sets = [f"calibration.samples={chosen.samples}", f"calibration.sequence_length={chosen.length}"]
    print(f"Calibration: {chosen.samples} × {chosen.length} tokens; at most {TUNING} tuning steps.")
    print(f"Held-out text: {WINDOWS} × {WINDOW} tokens; activations in 32 bit.\n")
    print(
        "| method | layers | MB | bits a weight | perplexity (base) | KL | library s | command s "
        "| peak MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    rows = [row for row in method_rows() if not chosen.only or row["method"] in chosen.only]
    depths = {row["method"]: chosen.layers or CUT * (row["method"] in SLOW) for row in rows}
    for layers in sorted(set(depths.values())):
        model = cut_layers(base, folder / f"cut{layers}", layers) if layers else base
        judge = Judge(model)
        for row in [row for row in rows if depths[row["method"]] == layers]:
            name = row["method"]
            if not row["available"]:
                print(f"| {name} | {row['reason']} | | | | | | | |", flush=True)
                continue
            more = sets if "calibration" in row["needs"] else []
            with tempfile.TemporaryDirectory() as work:
                out = Path(chosen.keep or work, name).resolve()
                try:
                    run = quantize(model, name, out, [*more, *SETTINGS.get(name, ())])
                except RuntimeError as error:
                    print(f"| {name} | {error} | | | | | | | |", flush=True)
                    continue
                perplexity, divergence = judge.judge(out)
            results = run.note["results"]
            print(
                f"| {name} | {layers or 'all'} | {results['weight_bytes'] / 1e6:.0f} "
                f"| {results['bits_per_weight']:.2f} | {perplexity:.4g} ({judge.perplexity:.4g}) "
                f"| {divergence:.4f} | {run.library:.1f} | {run.command:.1f} "
                f"| {run.peak / 2**20:.0f} |",
                flush=True,
            )


def against(chosen: argparse.Namespace, layers: int, model: Path, folder: Path) -> None:
    """The library stage beside a plain script, median of the rounds, in turn."""
    overrides: dict[str, object] = {"samples": chosen.samples, "sequence_length": chosen.length}
    tokens = build_tokens(load_calibration("default", overrides), model)
    calibration = [f"calibration.{key}={value}" for key, value in overrides.items()]
    older = for_transformers_4(model, folder / "transformers4")
    print(
        f"{layers} layers, {chosen.samples} × {chosen.length} tokens, median of "
        f"{chosen.rounds}; s is seconds, cpu those of all processors.\n\n| method | plain s "
        "| library s | ratio | plain cpu | cpu | ratio | plain MiB | MiB | ratio | plain command s "
        "| command s | tensors |\n" + "|---" * 13 + "|"
    )
    needs = {row["method"]: row["needs"] for row in method_rows()}
    for name in chosen.only or AGAINST:
        runs: dict[str, list[Measured]] = {"plain": [], "ours": []}
        sets = [*(calibration if "calibration" in needs[name] else []), *SETTINGS.get(name, ())]
        source = older if name.startswith("msmodelslim") else model
        with tempfile.TemporaryDirectory() as work:
            for number in range(chosen.rounds):
                places = {key: Path(work, f"{key}{number}") for key in runs}
                for key in list(runs) if number % 2 == 0 else list(runs)[::-1]:
                    runs[key].append(
                        plain(name, source, tokens.path, places[key])
                        if key == "plain"
                        else quantize(model, name, places[key], sets)
                    )
            made = [next(f.parent for f in places["plain"].rglob(p) if f.is_file())
                    for p in ("*.gguf", "config.json") if [*places["plain"].rglob(p)]]  # fmt: skip
            same = likeness(model, made[0], places["ours"])
        cells = [cell for key in ("library", "processors", "peak") for cell in compared(runs, key)]
        commands = [f"{middle(runs[key], 'command'):.1f}" for key in runs]
        print(" | ".join([f"| {name}", *cells, *commands, f"{same} |"]), flush=True)


def compared(runs: dict[str, list[Measured]], key: str) -> list[str]:
    """Both medians and their ratio."""
    base, mine = (middle(runs[side], key) for side in ("plain", "ours"))
    shown = [f"{v / 2**20:.0f}" if key == "peak" else f"{v:.1f}" for v in (base, mine)]
    return [*shown, f"{mine / base:.2f}"]


def middle(runs: list[Measured], key: str) -> float:
    return median(float(getattr(run, key)) for run in runs)


def likeness(model: Path, first: Path, second: Path) -> str:
    """`equal`, or both KL divergences from the source."""
    if contents(first) == contents(second):
        return "equal"
    judge = Judge(model)
    theirs, ours = (judge.judge(out)[1] for out in (first, second))
    return f"KL {theirs:.4f}, ours {ours:.4f}"


def contents(out: Path) -> dict[str, Any]:
    if gguf_in(out):
        return {name: held.raw.tobytes() for name, held in open_gguf(out).tensors.items()}
    return open_checkpoint(out).digests()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--against", action="store_true")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--keep", type=Path)
    chosen = parser.parse_args()
    if chosen.keep:
        chosen.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.against:
            layers = chosen.layers or CUT
            model = cut_layers(demo_model(), Path(folder, "cut"), layers)
            against(chosen, layers, model, Path(folder))
        else:
            table(chosen, demo_model(), Path(folder))


if __name__ == "__main__":
    main()
