"""Kill `quantkit quantize --method rtn_*` at random moments; each run resumes to the same tensors.

    python benchmarks/streaming_kills.py WORKDIR [--kills 50] [--method rtn_nvfp4a16] [--size 0.3]

Every kill is SIGKILL to the command at a random moment of the time that a whole run takes; the run
after it is `--resume`, ends undisturbed and is compared with a run that was never disturbed.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from random_llama import SIZES, make

from quantkit.checkpoint.directory import open_checkpoint


def command(source: Path, out: Path, method: str, *more: str) -> list[str]:
    base = [sys.executable, "-m", "quantkit", "quantize", str(source), "--method", method]
    return [*base, "--out", str(out), "--device", "cpu", "--jobs", "2", *more]


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--method", default="rtn_nvfp4a16")
    parser.add_argument("--size", choices=SIZES, default="0.3")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    source, whole, out = (chosen.work / name for name in ("source", "whole", "out"))
    make(source, chosen.size, shards=6)
    begun = time.monotonic()
    run(command(source, whole, chosen.method))
    span = time.monotonic() - begun
    expected = open_checkpoint(whole).digests()
    chance = random.Random(chosen.seed)
    killed = midway = 0
    while killed < chosen.kills:
        begun_anew = command(source, out, chosen.method)
        process = subprocess.Popen(
            begun_anew, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip
        try:
            process.wait(chance.random() * span)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            midway += any(out.with_name("out.partial").glob("*.safetensors"))
            if not out.exists():  # else it had published and was about to end
                run(command(source, out, chosen.method, "--resume"))
        assert open_checkpoint(out).digests() == expected, f"differs after kill {killed}"
        shutil.rmtree(out)
    print(
        f"{killed} kills, {midway} of them with finished shards: every run after one ended with "
        f"the same {len(expected)} tensors"
    )
    for folder in (source, whole):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
