"""The streaming stage alone, against its limits: rate by scheme, then time and memory by size.

    python benchmarks/streaming_stage.py WORKDIR [--sizes 1.1] [--schemes ...] [--rounds 3]
                                         [--jobs 2] [--device cpu]

Each run is a process of its own; the source is in the page cache; rates are source bytes a second,
medians of the rounds. Sizes 0.3 to 8 take up to 25 GB of disk in WORKDIR, which is removed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

TARGETS = {"fp8_dynamic": 1.0, "fp8_block": 1.0, "w4a16": 0.5, "nvfp4a16": 0.25, "mxfp4a16": 0.25}
CHILD = """
import json, sys, time
from pathlib import Path
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.network.modules import classify
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.backends.streaming.job import StreamOptions
from quantkit.backends.streaming.run import stream_quantize
source, out, scheme, jobs, device = sys.argv[1:]
checkpoint = open_checkpoint(Path(source))
modules = classify({n: i.shape for n, i in checkpoint.tensors.items()}, checkpoint.config)
layers = {m.name: SCHEMES[scheme] for m in modules if m.kind == "linear"}
Path(out).mkdir()
done = stream_quantize(checkpoint, layers, Path(out), options=StreamOptions(), shard_size=10**10,
                       jobs=int(jobs), device=device)
print(json.dumps([checkpoint.weight_bytes, done.seconds, done.peak_memory]))
"""


def run(source: Path, out: Path, scheme: str, jobs: int, device: str) -> tuple[float, float, float]:
    """GB of source, seconds, peak GB of one streamed run."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), scheme, str(jobs), device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        sys.exit(done.stderr)
    size, seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return size / 1e9, seconds["stream"], peak / 1e9


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from random_llama import SIZES, make

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1.1"])
    parser.add_argument("--schemes", nargs="+", default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    print(f"{'size':>6}{'scheme':>16}{'seconds':>9}{'GB/s':>7}{'target':>8}{'peak GB':>9}")
    for size in chosen.sizes:
        source = chosen.work / f"llama-{size}"
        make(source, size, shards=max(1, round(float(size) * 2 / 0.45)))
        for scheme in chosen.schemes:
            rounds = [
                run(source, chosen.work / "out", scheme, chosen.jobs, chosen.device)
                for _ in range(chosen.rounds)
            ]
            gigabytes = rounds[0][0]
            seconds = median(seconds for _, seconds, _ in rounds)
            peak = median(peak for _, _, peak in rounds)
            print(
                f"{size:>6}{scheme:>16}{seconds:9.2f}{gigabytes / seconds:7.2f}"
                f"{TARGETS.get(scheme, 0):8.2f}{peak:9.3f}", flush=True
            )  # fmt: skip
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
