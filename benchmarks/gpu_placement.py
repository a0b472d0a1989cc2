"""A random Llama quantized layer by layer under a cap of GPU memory: the same tensors as resident?

    python benchmarks/gpu_placement.py DIR [--size 8] [--cap 10] [--device cuda:0]

Needs nvidia-modelopt, llmcompressor and compressed-tensors beside torch and transformers, and this
repository on PYTHONPATH. Each run is the adapter in a process of its own: `resident` without a cap,
`layerwise` in `--cap` GB (`torch.cuda.set_per_process_memory_fraction`). Prints one JSON document:
per run its seconds, the peak of the GPU and of host memory, per method whether all tensors are
equal. DIR holds the model and the outputs (about 40 GB for 8 B).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from random_llama import SIZES, make
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.backends.process.job import Job, Result
from quantkit.checkpoint.schemes import SCHEMES

METHODS = {
    "modelopt_fp8": ("modelopt", "fp8"),
    "llmcompressor_w4a16": ("llmcompressor", "w4a16"),
}
PLACEMENTS = ("resident", "layerwise")
SAMPLES, LENGTH, BATCH = 16, 512, 4


class Quiet:
    """A reporter that tells nothing but notes, on stderr."""

    def stage(self, name: str, total: int = 0, unit: str = "steps") -> None:  # noqa: ARG002
        print(name, file=sys.stderr, flush=True)

    def advance(self, done: int) -> None:
        pass

    def note(self, text: str) -> None:
        print("note:", text, file=sys.stderr)


def prepare(folder: Path, size: str) -> None:
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
    ids = torch.randint(1, SIZES[size]["vocab"], (SAMPLES, LENGTH), generator=drawn)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    save_file(tokens, folder / "tokens.safetensors")


def job_of(folder: Path, method: str, placement: Any, device: str) -> Job:
    backend, scheme = METHODS[method]
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
        tokens=str(folder / "tokens.safetensors"),
        batch_size=BATCH,
        device=device,
        devices=[device],
        placement=placement,
    )


def one(job: Job, cap: float) -> dict[str, Any]:
    """Run the adapter here; `cap` is in GB, 0 for none."""
    cuda = job.device.startswith("cuda")
    if cuda and cap:
        total = torch.cuda.get_device_properties(job.device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / total, job.device)
    if job.backend == "modelopt":
        from quantkit.backends.adapters.modelopt import run
    else:
        from quantkit.backends.adapters.llmcompressor import run
    Path(job.out).mkdir()
    started, result = time.monotonic(), Result()
    run(job, Quiet(), result)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "gpu_peak_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
        "host_peak_bytes": host_peak(),
        "calibration": result.calibration,
    }


def host_peak() -> int:
    """Peak resident bytes of this process, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def digests(directory: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor as bytes, one after the other."""
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                yield name, shard.get_tensor(name).contiguous().view(-1).view(torch.uint8)


def differing(first: str, second: str) -> list[str]:
    """Names of tensors that only one has, or that differ in a byte."""
    ones, others = dict(digests(first)), dict(digests(second))
    return [
        name
        for name in sorted(ones.keys() | others.keys())
        if name not in ones or name not in others or not ones[name].equal(others[name])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="8")
    parser.add_argument("--cap", type=float, default=10)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "PLACEMENT"))
    chosen = parser.parse_args()
    if chosen.one:
        method, placement = chosen.one
        job = job_of(chosen.folder, method, placement, chosen.device)
        cap = chosen.cap if placement == "layerwise" else 0
        print(json.dumps(one(job, cap)))
        return
    prepare(chosen.folder, chosen.size)
    report: dict[str, Any] = {"size": chosen.size, "cap_gb": chosen.cap, "torch": torch.__version__}
    for method in METHODS:
        report[method] = {}
        for placement in PLACEMENTS:
            again = [sys.executable, *sys.argv, "--one", method, placement]
            done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=False)
            lines = done.stdout.splitlines()
            failed = {"failed": done.returncode}
            report[method][placement] = json.loads(lines[-1]) if not done.returncode else failed
        outs = [str(chosen.folder / f"{method}-{placement}") for placement in PLACEMENTS]
        if not any("failed" in run for run in report[method].values()):
            report[method]["differing"] = differing(*outs)[:10]
            report[method]["equal"] = not report[method]["differing"]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
