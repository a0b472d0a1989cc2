"""ModelOpt on a CUDA GPU: NVFP4 in its library and in the runtime, and `modelopt_*` by quantkit.

    python benchmarks/gpu_modelopt.py library DIR     # calibrate, forward, export, reload, compare
    python benchmarks/gpu_modelopt.py quantkit DIR METHOD   # seconds a stage, peak memory

DIR is a checkpoint in 16 bit with a tokenizer. `library` says how far the fake-quantized model's
logits are from those of the same weights exported and computed by the runtime's kernels.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.heldout import held_out_texts
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.runtime.load import load

SAMPLES, LENGTH = 16, 512


def windows(path: Path) -> torch.Tensor:
    """Windows of held-out text, [2 × SAMPLES, LENGTH]: to calibrate with and to compare on."""
    tokenizer = load_tokenizer(read_tokenizer_info(path))
    tokens: list[int] = []
    for text in held_out_texts():
        tokens += tokenizer.encode(text, False)
        if len(tokens) >= 2 * SAMPLES * LENGTH:
            break
    return torch.tensor(tokens[: 2 * SAMPLES * LENGTH]).view(-1, LENGTH).cuda()


def library(path: Path) -> dict[str, Any]:
    """NVFP4 by ModelOpt itself: seconds of each step, and the distance from the runtime."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    found: dict[str, Any] = {}
    ids = windows(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.cuda().eval()
    with torch.inference_mode():
        plain = model(ids[SAMPLES : SAMPLES + 4]).logits.float()

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            for start in range(0, SAMPLES, 4):
                model(ids[start : start + 4])

    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, calibrate)
    torch.cuda.synchronize()
    found["quantize_seconds"] = time.perf_counter() - start
    with torch.no_grad():
        model(ids[:1])  # compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        fake = model(ids[SAMPLES : SAMPLES + 4]).logits.float()
        torch.cuda.synchronize()
    found["forward_seconds"] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        export_hf_checkpoint(model, export_dir=folder)
        found["export_seconds"] = time.perf_counter() - start
        found["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        del model
        torch.cuda.empty_cache()
        runtime = load(folder, device="cuda")
        found["kernels"] = runtime.kernels()
        real = runtime(ids[SAMPLES : SAMPLES + 4]).logits.float()
    found["runtime_from_fake"] = _distance(fake, real)
    found["fake_from_bf16"] = _distance(plain, fake)
    found["runtime_from_bf16"] = _distance(plain, real)
    return found


def _distance(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """Mean KL divergence of the second from the first, and agreement on the likeliest token."""
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    return {
        "kl": float((one.exp() * (one - other)).sum(-1).mean()),
        "top1": float((one.argmax(-1) == other.argmax(-1)).float().mean()),
    }


def by_quantkit(path: Path, method: str) -> dict[str, Any]:
    """One `quantkit quantize --device cuda`: its stages, its wall time, the GPU's peak memory."""
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not done.wait(0.2):
            peak = max(peak, float(subprocess.check_output(query, text=True).split()[0]))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        run = subprocess.run(
            [
                sys.executable, "-m", "quantkit", "quantize", str(path), "--method", method,
                "--out", str(out), "--device", "cuda", "--json",
                "--set", f"calibration.samples={SAMPLES}",
                "--set", f"calibration.sequence_length={LENGTH}",
            ],
            stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        wall = time.perf_counter() - start
        done.set()
        watcher.join()
        if run.returncode:
            raise SystemExit(run.returncode)
        note = json.loads((out / "quantkit.json").read_text())
        runtime = load(out, device="cuda")
        kernels = runtime.kernels()
    stages = {stage["name"]: stage["seconds"] for stage in note["stages"]}
    return {
        "method": method, "wall_seconds": wall, "stages": stages,
        "peak_gigabytes": peak * 1024**2 / 1e9, "kernels": kernels,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("what", choices=["library", "quantkit"])
    parser.add_argument("path", type=Path)
    parser.add_argument("method", nargs="?", default="modelopt_fp8")
    chosen = parser.parse_args()
    if chosen.what == "library":
        print(json.dumps({"what": "library nvfp4", **library(chosen.path)}))
    else:
        print(json.dumps(by_quantkit(chosen.path, chosen.method)))


if __name__ == "__main__":
    main()
