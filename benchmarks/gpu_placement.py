"""A random Llama quantized layer by layer under a cap of GPU memory: the same tensors as resident?

    python benchmarks/gpu_placement.py DIR [--size 8] [--cap 10] [--device cuda:0] [--json FILE]

Needs the libraries of the methods beside torch and transformers, and this repository on PYTHONPATH.
Each run is the adapter in a process of its own: `resident` without a cap, `layerwise` in `--cap` GB
(`torch.cuda.set_per_process_memory_fraction`); the two of a method run at the same time on the one
GPU, so their seconds are those of a shared machine. Writes one JSON document after each method: per
run its seconds, the peak of the GPU and of host memory, per method whether all tensors are equal.
DIR holds the model and one method's outputs (at most 52 GB for 8 B).
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from random_llama import SIZES, make
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.backends.process.job import Job, Result
from quantkit.checkpoint.schemes import SCHEMES

METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "modelopt_fp8": ("modelopt", "fp8", {}),
    "llmcompressor_w4a16": ("llmcompressor", "w4a16", {}),
    "autoround_w4a16": ("autoround", "w4a16", {"iters": 10}),
    "gptqmodel_w4a16": ("gptqmodel", "w4a16", {}),
}
"""Name → backend, scheme and options."""
PLACEMENTS = ("resident", "layerwise")
SAMPLES, LENGTH, BATCH = 16, 512, 4
RUN_SECONDS = 330
"""After this a run is ended, so that the other one's numbers are still written."""


class Quiet:
    """A reporter that tells nothing but notes, on stderr."""

    def stage(self, name: str, total: int = 0, unit: str = "steps") -> None:  # noqa: ARG002
        print(name, file=sys.stderr, flush=True)

    def advance(self, done: int) -> None:
        pass

    def note(self, text: str) -> None:
        print("note:", text, file=sys.stderr)


def prepare(folder: Path, size: str, samples: int = SAMPLES) -> None:
    """The model, a tokenizer of one word, and random calibration tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = folder / "model"
    if not model.exists():
        make(model, size)
        words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        maker: Any = PreTrainedTokenizerFast
        fast = maker(tokenizer_object=words, unk_token="[UNK]", eos_token="[UNK]")
        fast.save_pretrained(model)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, SIZES[size]["vocab"], (samples, LENGTH), generator=drawn)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    save_file(tokens, folder / "tokens.safetensors")


def job_of(folder: Path, method: str, placement: Any, device: str) -> Job:
    backend, scheme, options = METHODS[method]
    names = json.loads((folder / "model/model.safetensors.index.json").read_text())["weight_map"]
    layers = [name.removesuffix(".weight") for name in names if "_proj." in name]
    return Job(
        task="quantize",
        backend=backend,
        adapter="",
        method=method,
        model=str(folder / "model"),
        out=str(folder / f"{method}-{placement}"),
        scheme=SCHEMES[scheme],
        layers=dict.fromkeys(layers, SCHEMES[scheme]),
        keep=["lm_head"],
        options=options,
        tokens=str(folder / "tokens.safetensors"),
        batch_size=BATCH,
        device=device,
        devices=[device],
        placement=placement,
    )


def one(job: Job, cap: float) -> dict[str, Any]:
    """Run the adapter here, and digest what it wrote; `cap` is in GB, 0 for none."""
    cuda = job.device.startswith("cuda")
    if cuda and cap:
        total = torch.cuda.get_device_properties(job.device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / total, job.device)
    adapter = import_module(f"quantkit.backends.adapters.{job.backend}")
    Path(job.out).mkdir()
    started, result = time.monotonic(), Result()
    adapter.run(job, Quiet(), result)
    seconds = round(time.monotonic() - started, 1)
    Path(f"{job.out}.json").write_text(json.dumps(dict(digests(job.out))))
    shutil.rmtree(job.out)
    return {
        "seconds": seconds,
        "gpu_peak_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
        "host_peak_bytes": host_peak(),
        "calibration": result.calibration,
    }


def host_peak() -> int:
    """Peak resident bytes of this process, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def digests(directory: str) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of the bytes of every tensor, one after the other."""
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                data = shard.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                yield name, hashlib.sha256(data.numpy()).hexdigest()


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that only one has, or that differ in a byte."""
    ones, others = (json.loads(file.read_text()) for file in (first, second))
    return [n for n in sorted(ones.keys() | others.keys()) if ones.get(n) != others.get(n)]


def both(method: str, folder: Path) -> dict[str, Any]:
    """A method with each placement at the same time, and whether they agree."""
    found: dict[str, Any] = {}
    again = [sys.executable, *sys.argv]
    running = {
        placement: subprocess.Popen(
            [*again, "--one", method, placement], stdout=subprocess.PIPE, text=True
        )
        for placement in PLACEMENTS
    }
    for placement, process in running.items():
        try:
            lines = process.communicate(timeout=RUN_SECONDS)[0].splitlines()
            found[placement] = (
                {"failed": process.returncode} if process.returncode else json.loads(lines[-1])
            )
        except subprocess.TimeoutExpired:
            process.kill()
            found[placement] = {"failed": f"not finished after {RUN_SECONDS} s"}
        shutil.rmtree(folder / f"{method}-{placement}", ignore_errors=True)
    return found | agreement(folder, method, PLACEMENTS)


def agreement(folder: Path, method: str, placements: tuple[str, str]) -> dict[str, Any]:
    """Whether all tensors are equal, where both were made."""
    first, second = (folder / f"{method}-{placement}.json" for placement in placements)
    if not (first.is_file() and second.is_file()):
        return {}
    differs, tensors = differing(first, second), len(json.loads(first.read_text()))
    return {"equal": not differs, "differing": len(differs), "first": differs[:10],
            "tensors": tensors}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="8")
    parser.add_argument("--cap", type=float, default=10)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "PLACEMENT"))
    chosen = parser.parse_args()
    if chosen.one:
        method, placement = chosen.one
        job = job_of(chosen.folder, method, placement, chosen.device)
        cap = chosen.cap if placement == "layerwise" else 0
        print(json.dumps(one(job, cap)))
        return
    started = time.monotonic()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    prepare(chosen.folder, chosen.size)
    report: dict[str, Any] = {"size": chosen.size, "cap_gb": chosen.cap, "torch": torch.__version__}
    for method in chosen.method or METHODS:
        report[method] = both(method, chosen.folder)
        report["seconds"] = round(time.monotonic() - started, 1)
        text = json.dumps(report, indent=2)
        print(text, flush=True)
        if chosen.json:
            chosen.json.write_text(text)


if __name__ == "__main__":
    main()
