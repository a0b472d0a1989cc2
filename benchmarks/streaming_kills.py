"""Kill `quantkit quantize --method rtn_*` at random moments; each run resumes to the same tensors.

    python benchmarks/streaming_kills.py WORKDIR [--kills 50] [--method rtn_nvfp4a16] [--size 0.3]

Every kill is SIGKILL to the command at a random moment of the time that a whole run takes. The
run after it is `--resume` and may be killed too; one that finishes is compared with an undisturbed
run, and the next begins anew.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from random_llama import SIZES, make

from quantkit.checkpoint import open_checkpoint


def command(source: Path, out: Path, method: str, *more: str) -> list[str]:
    base = [sys.executable, "-m", "quantkit", "quantize", str(source), "--method", method]
    return [*base, "--out", str(out), "--device", "cpu", "--jobs", "2", *more]


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
    subprocess.run(command(source, whole, chosen.method), check=True, capture_output=True)
    span = time.monotonic() - begun
    expected = open_checkpoint(whole).digests()
    chance = random.Random(chosen.seed)
    killed = checked = 0
    while killed < chosen.kills or not checked:
        more = ["--resume"] if out.with_name("out.partial").exists() else []
        process = subprocess.Popen(command(source, out, chosen.method, *more),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        try:
            limit = chance.random() * span if killed < chosen.kills else None
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            continue
        if process.returncode:
            sys.exit(errors.decode())
        assert open_checkpoint(out).digests() == expected, f"differs after {killed} kills"
        checked += 1
        shutil.rmtree(out)
    print(
        f"{killed} kills, {checked} runs finished, every one with the same {len(expected)} tensors"
    )
    for folder in (source, whole):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
