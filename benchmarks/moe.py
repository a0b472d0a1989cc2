"""Decode of a mixture of experts in the runtime against a dense model of the same active size.

    python benchmarks/moe.py WORKDIR [--source DIR]

The mixture is the source (the demo model unless named) upcycled to 4 experts, 2 of which compute a
token; the dense model has the source's MLP twice, side by side, each giving half. Both are read and
run in one process, in turns; prints tokens/s at batch 1 (the median of the rounds) and the ratio.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.upcycle import ACTIVE, upcycle
from quantkit.runtime.load import load
from quantkit.runtime.model import Runtime

PROMPT, NEW, ROUNDS = 32, 64, 5


def widened(source: Path, target: Path) -> Path:
    """The dense model whose MLP is `ACTIVE` times as wide, and gives the same."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if ".mlp." in name:
            down = ".down_proj." in name
            part = weight / ACTIVE if down else weight
            tensors[name] = torch.cat([part] * ACTIVE, dim=1 if down else 0)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] *= ACTIVE
    (target / "config.json").write_text(json.dumps(config))
    return target


def rate(runtime: Runtime, ids: torch.Tensor) -> float:
    """New tokens a second, prefill subtracted."""
    spent = []
    for new in (1, NEW):
        start = time.perf_counter()
        runtime.generate(ids, max_new_tokens=new, eos_token_id=[])
        spent.append(time.perf_counter() - start)
    return (NEW - 1) / (spent[1] - spent[0])


def main() -> None:
    """Make both models where they are missing, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--source", type=Path)
    asked = parser.parse_args()
    source = asked.source or demo_model()
    models = {"mixture": asked.work / "mixture", "dense": asked.work / "dense"}
    if not models["mixture"].is_dir():
        upcycle(source, models["mixture"], 2 * ACTIVE)
    if not models["dense"].is_dir():
        widened(source, models["dense"])
    runtimes = {name: load(path) for name, path in models.items()}
    ids = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, runtime in runtimes.items():
            found[name].append(rate(runtime, ids.to(runtime.device)))
    rates = {name: sorted(each[1:])[ROUNDS // 2] for name, each in found.items()}
    for name, value in rates.items():
        print(f"{name}: {value:.1f} tokens/s, {runtimes[name].memory_bytes / 1e6:.0f} MB")
    print(f"time of the mixture / the dense model: {rates['dense'] / rates['mixture']:.2f}")


if __name__ == "__main__":
    main()
