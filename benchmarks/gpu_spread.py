"""A random Llama on several GPUs: ModelOpt divides its weights, LLM Compressor the samples.

    python benchmarks/gpu_spread.py DIR [--devices cuda:0,1] [--size 8] [--cap 12] [--samples 32]
                                    [--method NAME …] [--json FILE]

Needs what `gpu_placement.py` needs. Real workers on the first GPU, `layerwise`, then on all,
`spread`. All but `--cap` GB of each GPU is taken by this process meanwhile, so that a model of 8 B
(16 GB) is larger than one. Writes one JSON document after each method: per run its seconds by
stage and the peak of every GPU as NVML tells it, and whether the tensors are equal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]
import torch
from gpu_placement import METHODS, Quiet, agreement, digests, job_of, prepare
from random_llama import SIZES

from quantkit.backends.environments.device import resolve_devices
from quantkit.backends.process.parent import run_worker
from quantkit.backends.registry import backend_named
from quantkit.errors import QuantkitError


class Peaks(threading.Thread):
    """The most that each GPU had in use since the start, beyond what it had then, in bytes."""

    def __init__(self, devices: list[str]) -> None:
        super().__init__(daemon=True)
        pynvml.nvmlInit()
        numbers = [int(device.partition(":")[2]) for device in devices]
        self.handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
        self.before = self.used()
        self.most, self.over = self.before, threading.Event()
        self.start()

    def used(self) -> list[int]:
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self.handles]

    def run(self) -> None:
        while not self.over.wait(0.05):
            self.most = [max(pair) for pair in zip(self.most, self.used(), strict=True)]

    def read(self) -> list[int]:
        self.over.set()
        return [most - before for most, before in zip(self.most, self.before, strict=True)]


def spread(method: str, folder: Path, devices: list[str]) -> dict[str, Any]:
    """A method by real workers on the first device and on all, and whether they agree."""
    found: dict[str, Any] = {}
    python, ranks = Path(sys.executable), backend_named(METHODS[method][0]).ranks
    for name, used in (("layerwise", devices[:1]), ("spread", devices)):
        shared = ranks and len(used) > 1
        job = replace(job_of(folder, method, name, devices[0]), devices=used, ranks=shared)
        job = replace(job, adapter=backend_named(job.backend).adapter)
        Path(job.out).mkdir()
        peaks, started = Peaks(used), time.monotonic()
        try:
            result = run_worker(job, python=python, log=folder / "log", report=Quiet())
        except QuantkitError as error:
            found[name] = {"failed": error.message}
            print((folder / "log").read_text()[-2000:], file=sys.stderr)
            continue
        finally:
            seconds, most = round(time.monotonic() - started, 1), peaks.read()
        Path(f"{job.out}.json").write_text(json.dumps(dict(digests(job.out))))
        shutil.rmtree(job.out)
        found[name] = {
            "seconds": seconds,
            "stages": {stage["name"]: stage["seconds"] for stage in result.stages},
            "gpu_peak_bytes": most,
            "host_peak_bytes": result.peak_rss_bytes,
            "calibration": result.calibration,
        }
    return found | agreement(folder, method, ("layerwise", "spread"))


def balloon(device: str, cap: float) -> torch.Tensor:
    """What leaves `cap` GB of a device free."""
    free, _ = torch.cuda.mem_get_info(device)
    return torch.empty(max(0, int(free - cap * 1e9)), dtype=torch.uint8, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", default="cuda:0,1")
    parser.add_argument("--size", choices=SIZES, default="8")
    parser.add_argument("--cap", type=float, default=12)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    prepare(chosen.folder, chosen.size, chosen.samples)
    devices = list(resolve_devices(chosen.devices))
    balloons = [balloon(device, chosen.cap) for device in devices]
    report: dict[str, Any] = {"size": chosen.size, "cap_gb": chosen.cap, "torch": torch.__version__}
    for method in chosen.method or METHODS:
        report[method] = spread(method, chosen.folder, devices)
        text = json.dumps(report, indent=2)
        print(text, flush=True)
        if chosen.json:
            chosen.json.write_text(text)
    del balloons


if __name__ == "__main__":
    main()
