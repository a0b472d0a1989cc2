"""Kill `quantkit quantize` at random moments; each run resumes to the same tensors.

    python benchmarks/kills.py WORKDIR [--kills 50] [--again 0.25] [--methods rtn_nvfp4a16 …]

Every kill is SIGKILL to the command at a random moment of the time that a whole run takes, on the
demo model cut to a few layers, each method in turn. The run after it is `--resume`, which is killed
too by the chance of --again. The last ends undisturbed and is compared with a run that was never
disturbed; what has been shown by then is printed.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.directory import open_checkpoint
from tests.support.helpers import cut_layers

QUICK = ("calibration.samples=8", "calibration.sequence_length=128")
METHODS: dict[str, tuple[str, ...]] = {
    "rtn_nvfp4a16": (),
    "llmcompressor_w4a16": (*QUICK, "group_size=64"),
    "modelopt_fp8": QUICK,
    "gptqmodel_w4a16": (*QUICK, "group_size=64"),
    "autoround_w4a16": (*QUICK, "group_size=64", "options.iters=2"),
    "msmodelslim_w8a8": QUICK,
}


def command(source: Path, out: Path, method: str, *more: str) -> list[str]:
    base = [sys.executable, "-m", "quantkit", "quantize", str(source), "--method", method]
    sets = [word for value in METHODS[method] for word in ("--set", value)]
    return [*base, "--out", str(out), "--device", "cpu", *sets, *more]


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def killed(arguments: list[str], seconds: float) -> bool:
    """Whether the command was killed before it ended; nothing that it started stays."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        started: list[Any] = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive, f"{alive} outlived the command"
        return True
    return False


def reached(out: Path) -> str:
    """How far the run that was killed had come."""
    state = out.with_name(out.name + ".partial") / ".stream"
    if out.exists():
        return "published"
    if (state / "done.json").is_file():
        return "library finished"
    if any((state / "layers").rglob("*.json")) or (state / "layers" / "CURRENT").is_file():
        return "layers finished"
    if any(state.parent.glob("*.safetensors")):
        return "shards finished"
    return "library at work" if (state / "library").is_dir() else "before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=50, help="of each method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--again", type=float, default=0.25)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    source = cut_layers(demo_model(), chosen.work / "source", chosen.layers)
    chance = random.Random(chosen.seed)
    for method in chosen.methods:
        soak(source, chosen.work, method, chosen.kills, chosen.again, chance)
    shutil.rmtree(source)


def soak(
    source: Path, work: Path, method: str, kills: int, again: float, chance: random.Random
) -> None:
    whole, out = work / "whole", work / "out"
    begun = time.monotonic()
    run(command(source, whole, method))
    span = time.monotonic() - begun
    expected = open_checkpoint(whole).digests()
    names = {path.name for path in whole.iterdir()}
    count, where = 0, Counter[str]()
    while count < kills:
        resume: tuple[str, ...] = ()
        while killed(command(source, out, method, *resume), chance.random() * span):
            count += 1
            where[reached(out)] += 1
            resume = ("--resume",)
            if out.exists() or chance.random() >= again or count >= kills:
                break
        if not out.exists():
            run(command(source, out, method, "--resume"))
        assert open_checkpoint(out).digests() == expected, f"{method} differs after kill {count}"
        assert {path.name for path in out.iterdir()} == names
        left = {path.name for path in work.iterdir()} - {"source", "whole", "out"}
        assert not left, f"{left} stay behind"
        shutil.rmtree(out)
        print(f"{method}: {count} kills ({dict(where)}), same {len(expected)} tensors", flush=True)
    shutil.rmtree(whole)


if __name__ == "__main__":
    main()
