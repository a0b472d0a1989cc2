"""What a sweep costs: two workers against one, and one against the same commands one by one.

    python benchmarks/sweep.py WORKDIR [--layers 6] [--samples 8] [--rounds 1]
    python benchmarks/sweep.py WORKDIR --ray [--layers 3] [--samples 2]

Eight cells on the demo model cut to so many layers, one thread a cell. Each way begins with the
baseline unmeasured. Prints seconds by the clock and of processors, the speed of two workers over
one (asked: at least 1.7) and the overhead of the sweep over `quantize` and `validate` of every cell
(asked: at most 5 %).

With --ray: six recipes on that model and on a mixture made of it, on a Ray cluster of two nodes
that is started here; the leaderboard is in WORKDIR/ray.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.paths import cache_dir
from quantkit.checkpoint.upcycle import upcycle
from quantkit.errors import EXIT_CHECK
from quantkit.recipe.load import as_changes
from tests.support.helpers import cut_layers

METHODS = ("rtn_w8a16", "rtn_w4a16", "rtn_nvfp4a16", "rtn_fp8_dynamic")
SETS = ({"on_misfit": "fit"}, {"on_misfit": "fit", "ignore+": ["*.down_proj"]})


def main() -> None:
    """Time the three ways in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ray", action="store_true")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    model = asked.work / f"demo_{asked.layers}_layers"
    if not model.exists():
        cut_layers(demo_model(), model, asked.layers)
    file = asked.work / "sweep.yaml"
    if asked.ray:
        on_ray(asked.work, file, model, asked.samples)
        return
    settings = [{"set": one} for one in SETS]
    write(file, [model], list(METHODS), asked.samples, settings=settings)
    seconds: dict[str, list[tuple[float, float]]] = {"commands": [], "one": [], "two": []}
    for _ in range(asked.rounds):
        seconds["commands"].append(timed(asked.work, commands(asked.work, model, asked.samples)))
        for name, jobs in (("one", 1), ("two", 2)):
            words = ["sweep", str(file), "--out", str(asked.work / "out"), "--jobs", str(jobs)]
            seconds[name].append(timed(asked.work, [words]))
    found = {name: statistics.median(clock for clock, _ in both) for name, both in seconds.items()}
    for name, value in found.items():
        each = ", ".join(f"{clock:.1f}, processors {busy:.1f}" for clock, busy in seconds[name])
        print(f"{name}: {value:.1f} s ({each})")
    print(f"two workers over one: {found['one'] / found['two']:.2f} ×")
    print(f"overhead over single commands: {found['one'] / found['commands'] - 1:+.1%}")


def write(
    file: Path,
    models: list[Path],
    recipes: list[Any],
    samples: int,
    throughput: bool = False,
    **more: Any,
) -> None:
    """The file of a sweep."""
    validate = {"samples": samples, "throughput": throughput, "broken_baseline": True}
    told = {"models": [str(one) for one in models], "recipes": recipes, "validate": validate}
    file.write_text(yaml.safe_dump(told | more))


def on_ray(work: Path, file: Path, model: Path, samples: int) -> None:
    """Two models × six recipes on two nodes, and the table."""
    from ray.cluster_utils import Cluster

    mixture = work / f"{model.name}_mixture"
    if not mixture.exists():
        upcycle(model, mixture, 4)
    budget = {"target_bits": 5.4, "samples": samples}
    recipes = [*({"method": method, "set": SETS[0]} for method in METHODS),
               {"method": "rtn_w4a16", "set": {"group_size": 32}},
               {"method": "auto", "set": budget}]  # fmt: skip
    write(file, [model, mixture], recipes, samples, throughput=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, "-m", "quantkit", "sweep", str(file), "--out",
                               str(work / "ray"), "--resume"], env=environment)  # fmt: skip
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
    if done.returncode not in (0, EXIT_CHECK):
        sys.exit(f"the sweep ended with {done.returncode}")
    print(f"{time.perf_counter() - start:.0f} s; {work / 'ray' / 'leaderboard.html'}")


def commands(work: Path, model: Path, samples: int) -> list[list[str]]:
    """`quantize` and `validate` of every cell."""
    found = []
    for number, (method, sets) in enumerate((m, s) for m in METHODS for s in SETS):
        out = str(work / "out" / str(number))
        changes = [word for change in as_changes(sets) for word in ("--set", change)]
        found.append(["quantize", str(model), "--method", method, *changes, "--out", out])
        found.append(
            ["validate", out, "--baseline", str(model), "--samples", str(samples),
             "--no-throughput", "--broken-baseline", "--report", f"{out}.html",
             "--report", f"{out}.json"]
        )  # fmt: skip
    return found


def timed(work: Path, runs: list[list[str]]) -> tuple[float, float]:
    """Seconds of these commands one after the other, with no baseline measured before: by the
    clock, and of all processors."""
    cache = work / "cache"
    for folder in (cache, work / "out"):
        shutil.rmtree(folder, ignore_errors=True)
    cache.mkdir()
    for held in cache_dir().iterdir():
        if held.name != "validate":
            (cache / held.name).symlink_to(held)
    environment = os.environ | {"QUANTKIT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    start, before = time.perf_counter(), used()
    for words in runs:
        done = subprocess.run(
            [sys.executable, "-m", "quantkit", *words], env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode not in (0, EXIT_CHECK):
            sys.exit(done.stderr)
    return time.perf_counter() - start, used() - before


def used() -> float:
    """Processor seconds of the processes that this one waited for, and of theirs."""
    held = resource.getrusage(resource.RUSAGE_CHILDREN)
    return held.ru_utime + held.ru_stime


if __name__ == "__main__":
    main()
