"""`quantkit quantize --method modelopt_fp8` against a plain ModelOpt script, in turn.

Same model, same calibration tokens, same export; the tensors of both must be equal. Prints medians
and their ratios: the library's stages (load, calibrate, export), their peak memory, and the whole
command, in which quantkit also plans, scans, seals and verifies.

    python benchmarks/modelopt_fp8.py [--samples 128] [--length 512] [--rounds 3] [--model DIR]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from quantkit.backends.registry import load_recipe
from quantkit.calibration import build_tokens, load_calibration
from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.directory import open_checkpoint

STAGES = ("load", "calibrate", "export")
PLAIN = Path(__file__).with_name("plain_modelopt_fp8.py")
TARGETS = {"library seconds": 1.05, "library peak MiB": 1.05, "command seconds": 1.25}


def timed(command: list[str]) -> tuple[dict[str, float], str]:
    """Wall and processor seconds (of descendants too) and stdout of a command that must succeed."""
    start, before = time.monotonic(), processor_seconds()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    seconds = {
        "command seconds": time.monotonic() - start,
        "  processor seconds": processor_seconds() - before,
    }
    return seconds, done.stdout


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plain(model: Path, tokens: Path, out: Path, batch_size: int) -> dict[str, float]:
    command, text = timed(
        [sys.executable, str(PLAIN), str(model), str(tokens), str(out), str(batch_size)]
    )
    told = json.loads(text.splitlines()[-1])
    return measured(told["seconds"], told["peak_rss_bytes"], command)


def ours(model: Path, out: Path, sets: list[str]) -> dict[str, float]:
    arguments = [sys.executable, "-m", "quantkit", "quantize", str(model), "--json"]
    arguments += ["--method", "modelopt_fp8", "--out", str(out), "--device", "cpu"]
    command, _ = timed(arguments + [part for change in sets for part in ("--set", change)])
    told = json.loads((out / "quantkit.json").read_text())
    seconds = {stage["name"]: stage["seconds"] for stage in told["stages"]}
    seconds["calibrate"] += seconds["quantize"]  # one call of the library in the plain script
    return measured(seconds, told["peak_rss_bytes"], command)


def measured(
    seconds: dict[str, Any], peak: int, command: dict[str, float]
) -> dict[str, float]:  # fmt: skip
    return {
        "library seconds": sum(seconds[name] for name in STAGES),
        "library peak MiB": peak / 2**20,
        **{f"  {name} seconds": seconds[name] for name in STAGES},
        **command,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    chosen = parser.parse_args()
    model: Path = chosen.model or demo_model()
    overrides: dict[str, object] = {"samples": chosen.samples, "sequence_length": chosen.length}
    tokens = build_tokens(load_calibration("default", overrides), model)
    recipe = load_recipe("modelopt_fp8")
    assert recipe.calibration is not None
    sets = [f"calibration.{key}={value}" for key, value in overrides.items()]
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "quantkit": []}
    for number in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as folder:
            places = {name: Path(folder, name) for name in runs}
            order = list(runs) if number % 2 == 0 else list(runs)[::-1]
            for name in order:
                runs[name].append(
                    plain(model, tokens.path, places[name], recipe.calibration.batch_size)
                    if name == "plain"
                    else ours(model, places[name], sets)
                )
            first, second = (open_checkpoint(place).digests() for place in places.values())
            assert first == second, "the two checkpoints differ"
    print(f"{chosen.samples} x {chosen.length} tokens, {chosen.rounds} rounds, equal tensors")
    print(f"{'median of':24}{'plain':>10}{'quantkit':>10}{'ratio':>8}{'target':>8}")
    for key in runs["plain"][0]:
        base, mine = (median(run[key] for run in runs[name]) for name in runs)
        target = f"{TARGETS[key]:8.2f}" if key in TARGETS else ""
        print(f"{key:24}{base:10.2f}{mine:10.2f}{mine / base:8.2f}{target}")


if __name__ == "__main__":
    main()
