"""A mixture of experts: the libraries through quantkit, and decode in the runtime.

    python benchmarks/moe.py WORKDIR [--source DIR]
    python benchmarks/moe.py WORKDIR --libraries [NAME …] [--rounds 3] [--samples 16] [--length 256]
                                     [--layers N]

With --libraries: the library stage of `quantkit quantize` on the demo mixture of 4 experts (cut to
N layers), from loading to saving, beside the library's own script (plain_methods.py) with the same
samples, in turn: medians of time and peak memory, whose ratios should be at most 1.05. The tensors
of both must be equal. ModelOpt by itself brings tokens to the experts that they are routed to, and
is compared with `experts=routed`; LLM Compressor brings every token to every expert on both sides.

Without: decode of a mixture in the runtime against a dense model of the same active size. The
mixture is the source (the demo model unless named) upcycled to 4 experts, 2 of which compute a
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
from methods import TUNED
from safetensors.torch import load_file, save_file
from scripts_in_turn import add_sizes, contents, print_in_turn

from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.upcycle import ACTIVE, demo_mixture, upcycle
from quantkit.runtime.load import load
from quantkit.runtime.model import Runtime
from tests.support.helpers import cut_layers

PROMPT, NEW, ROUNDS = 32, 64, 5
LIBRARIES: dict[str, tuple[str, ...]] = {
    "llmcompressor_fp8_dynamic": (),
    "llmcompressor_w4a16": ("group_size=64",),
    "llmcompressor_nvfp4": (),
    "autoround_w4a16": ("group_size=64", *TUNED, "on_unseen=rtn"),
    "modelopt_fp8": ("experts=routed", "on_unseen=rtn"),
    "modelopt_nvfp4": ("experts=routed", "on_unseen=rtn"),
}
"""Methods whose library stage is compared with a plain script, and their settings."""
MIXTRAL = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.",
           ".up_proj.": ".w3."}  # fmt: skip
"""What the libraries call parts of a Mixtral → its names on disk, as engines read them."""


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


def mixture(work: Path, layers: int | None) -> Path:
    """The demo mixture of 4 experts, or one cut to so many layers, made in `work`."""
    if layers is None:
        return demo_mixture()
    made = work / f"mixture_{layers}_layers"
    if not made.is_dir():
        upcycle(cut_layers(demo_model(), work / f"demo_{layers}_layers", layers), made, 2 * ACTIVE)
    return made


def digests(path: Path) -> dict[str, str]:
    """Digest of every tensor by the name that engines read."""
    found = {}
    for name, digest in contents(path).items():
        for theirs, ours in MIXTRAL.items():
            name = name.replace(theirs, ours)
        found[name] = digest
    return found


def decode(asked: argparse.Namespace) -> None:
    """Make both models where they are missing, and measure."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--libraries", nargs="*", choices=LIBRARIES)
    add_sizes(parser)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.libraries is not None:
        model = asked.source or mixture(asked.work, asked.layers)
        methods = {name: LIBRARIES[name] for name in asked.libraries or LIBRARIES}
        print_in_turn(model, methods, asked, digests)
    else:
        decode(asked)


if __name__ == "__main__":
    main()
