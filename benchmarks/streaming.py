"""`quantkit quantize --method rtn_*` against LLM Compressor's `model_free_ptq`, in turn.

A random Llama of 1.1 B parameters in five shards; every run is a whole process, the source in the
page cache; the tensors of both must be equal. Prints medians of wall time and of peak memory (the
proportional set size of the process tree, mapped pages counted), and their ratios.

    python benchmarks/streaming.py WORKDIR [--rounds 3] [--schemes fp8_dynamic …]

WORKDIR takes 8 GB, removed at the end.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from random_llama import make

from quantkit.backends.streaming.memory import tree_memory
from quantkit.checkpoint.directory import open_checkpoint

PLAIN = Path(__file__).with_name("plain_model_free_ptq.py")
SCHEMES = {
    "fp8_dynamic": ("FP8_DYNAMIC", 0.25, 0.4),
    "fp8_block": ("FP8_BLOCK", 0.25, 0.4),
    "w4a16": ("W4A16", 0.30, 0.4),
    "nvfp4a16": ("NVFP4A16", 0.15, 0.3),
    "mxfp4a16": ("MXFP4A16", 0.25, 0.4),
}
"""Scheme → LLM Compressor's name of it, the wanted ratios of wall time and of memory."""

LOOK_SECONDS = 0.1


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak GB of a process tree that must succeed."""
    start, peak = time.monotonic(), 0
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ) as process:  # fmt: skip
        while True:
            try:
                _, errors = process.communicate(timeout=LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, tree_memory(process.pid))
        wall = time.monotonic() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{errors}")
    return wall, peak / 1e9


def theirs(source: Path, out: Path, scheme: str, workers: int) -> tuple[float, float]:
    name = SCHEMES[scheme][0]
    return run([sys.executable, str(PLAIN), str(source), str(out), name, str(workers)])


def ours(source: Path, out: Path, scheme: str, workers: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "quantkit", "quantize", str(source), "--device", "cpu"]
    command += ["--method", f"rtn_{scheme}", "--out", str(out), "--jobs", str(workers)]
    return run(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    source = chosen.work / "llama-1.1"
    make(source)
    open_checkpoint(source).digests()  # into the page cache
    print(f"{'scheme':>12}{'LLM Compressor':>22}{'quantkit':>18}{'wall':>8}{'target':>8}"
          f"{'memory':>8}{'target':>8}", flush=True)  # fmt: skip
    for scheme in chosen.schemes:
        walls: dict[str, list[float]] = {"theirs": [], "ours": []}
        peaks: dict[str, list[float]] = {"theirs": [], "ours": []}
        for number in range(chosen.rounds):
            places = {"theirs": chosen.work / "theirs", "ours": chosen.work / "ours"}
            order = list(places.items())
            for name, place in order if number % 2 == 0 else order[::-1]:
                does = theirs if name == "theirs" else ours
                wall, peak = does(source, place, scheme, chosen.workers)
                walls[name].append(wall)
                peaks[name].append(peak)
            first, second = (open_checkpoint(place).digests() for place in places.values())
            assert first == second, "the two checkpoints differ"
            for place in places.values():
                shutil.rmtree(place)
        base, mine = median(walls["theirs"]), median(walls["ours"])
        base_peak, mine_peak = median(peaks["theirs"]), median(peaks["ours"])
        _, wall_target, peak_target = SCHEMES[scheme]
        print(f"{scheme:>12}{base:13.1f} s{base_peak:5.2f} GB{mine:9.1f} s{mine_peak:5.2f} GB"
              f"{mine / base:8.2f}{wall_target:8.2f}{mine_peak / base_peak:8.2f}{peak_target:8.2f}",
              flush=True)  # fmt: skip
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
