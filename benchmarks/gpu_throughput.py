"""One table of tokens/s on one card in one run: the runtime beside vLLM and SGLang, captured.

    python benchmarks/gpu_throughput.py --site FOLDER --work DIR --json FILE [--size 8]
                                        [--sglang FOLDER …] [--schemes bf16 fp8_dynamic …]

FOLDER holds vLLM, those of --sglang SGLang and what it needs (`engines_gpu_pack.py` brings them). A
random Llama: the runtime's weights are made on the GPU as in `gpu.py`, the engines' are their own
dummies under the config.json that quantkit writes for the scheme. Prefill is 8 × 512 and 1 × 4096
tokens, decoding 128 tokens after 128, at batches 1, 8 and 32. vLLM is asked as `vllm bench latency`
asks it, SGLang by its `sglang.benchmark.one_batch`. Writes the JSON after each scheme; prints the
table, × of the same side's BF16 in brackets.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import DECODES, NEW, PREFILLS, PROMPT
from random_llama import SIZES, config_of, make

import quantkit
from quantkit.checkpoint.demo import demo_model
from quantkit.validation.reports.markdown import table

SCHEMES = ("bf16", "fp8_dynamic", "w4a16", "nvfp4a16", "w8a8_dynamic")
HERE = Path(__file__).parent
SIDES = ("quantkit", "vLLM", "SGLang")
# what is brought of SGLang has no FlashAttention; one_batch measures decoding by the step
SGLANG = ["--attention-backend", "triton", "--sampling-backend", "pytorch",
          "--grammar-backend", "none", "--mem-fraction-static", "0.6",
          "--cuda-graph-backend-prefill", "disabled"]  # fmt: skip


def config_folder(scheme: str, size: str, work: Path) -> Path:
    """A folder with the config.json of the large model, quantized as quantkit does a small one."""
    small, folder = work / "small", work / f"config-{scheme}"
    if not small.is_dir():
        make(small, "0.01")
    quantization: dict[str, Any] = {}
    if scheme != "bf16":
        source = work / f"small-{scheme}"
        if not source.is_dir():
            quantkit.quantize(small, method=f"rtn_{scheme}", out=source)
        written = json.loads((source / "config.json").read_text())
        quantization = {"quantization_config": written["quantization_config"]}
    folder.mkdir(exist_ok=True)
    for file in demo_model().glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    config = config_of(SIZES[size]) | quantization | {"max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def vllm(folder: Path, site: Path) -> dict[str, float]:
    """Tokens/s of the engine in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(site), "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "plain_vllm.py"), str(folder), "--dummy",
               "--sequences", str(max(DECODES)), "--length", "4352"]  # fmt: skip
    found: dict[str, float] = {}
    started = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None

        def seconds(batch: int, prompt: int, new: int) -> float:
            """The median of three, after one that is not counted."""
            times = []
            for _ in range(4):
                print(batch, prompt, new, file=engine.stdin, flush=True)
                times.append(float(engine.stdout.readline()))  # type: ignore[union-attr]
            return sorted(times[1:])[1]

        for batch, length in PREFILLS:
            found[f"prefill {batch} × {length}"] = batch * length / seconds(batch, length, 1)
        found["start"] = time.monotonic() - started
        for batch in DECODES:
            step = (seconds(batch, PROMPT, NEW + 1) - seconds(batch, PROMPT, 1)) / NEW
            found[f"decode {batch}"] = batch / step
        engine.stdin.close()
    return found


def sglang(folder: Path, sites: list[Path]) -> dict[str, float]:
    """Tokens/s of the engine's own benchmark: each shape twice, the first is not counted."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, sites)), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    file, log = folder / "sglang.jsonl", folder / "sglang.log"
    file.unlink(missing_ok=True)
    batches = [str(batch) for batch in DECODES for _ in range(2)]
    command = [
        sys.executable, "-m", "sglang.benchmark.one_batch", "--model-path", str(folder),
        "--load-format", "dummy", "--dtype", "bfloat16", *SGLANG, "--context-length", "4352",
        "--cuda-graph-bs-decode", *map(str, DECODES), "--batch-size", *batches,
        "--input-len", str(PROMPT), "512", "--output-len", str(NEW + 1),
        "--result-filename", str(file),
    ]  # fmt: skip
    with log.open("w") as stream:
        subprocess.run(command, check=True, env=environment, stdout=stream, stderr=stream)
    found: dict[str, float] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        batch, length = row["batch_size"], row["input_len"]
        if (batch, length) in PREFILLS:
            found[f"prefill {batch} × {length}"] = row["prefill_throughput"]
        if length == PROMPT:
            found[f"decode {batch}"] = row["median_decode_throughput"]
    return found


def runtime(schemes: list[str], size: str, work: Path) -> list[dict[str, Any]]:
    """The same of the built-in runtime, by `gpu.py` in a process of its own."""
    file = work / "runtime.json"
    command = [sys.executable, str(HERE / "gpu.py"), "--parts", "models", "--size", size,
               "--models", *schemes, "--json", str(file)]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: list[dict[str, Any]] = json.loads(file.read_text())["models"]
    return found


def asked(engine: Callable[[Path, Any], dict[str, float]], folder: Path, site: Any) -> Any:
    """What an engine finds, or its error."""
    try:
        return engine(folder, site)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each side of a scheme; in brackets × of the same side's BF16."""
    columns = [f"prefill {b} × {n}" for b, n in PREFILLS] + [f"decode {b}" for b in DECODES]
    found = []
    for entry in entries:
        for side in (side for side in SIDES if side in entry):
            speeds, base = entry[side], entries[0][side]
            cells = [
                f"{speeds[name]:,.0f} ({speeds[name] / base[name]:.2f})"
                if name in speeds and name in base
                else "–"
                for name in columns
            ]
            kernels = ", ".join(speeds.get("kernels", ()))
            found.append([entry["scheme"], side + (f" `{kernels}`" if kernels else ""), *cells])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--sglang", type=lambda name: Path(name).resolve(), nargs="+", default=[])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="8")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "schemes": [],
    }  # fmt: skip
    entries: list[dict[str, Any]] = document["schemes"]
    ours = runtime(chosen.schemes, chosen.size, chosen.work)
    for scheme, measured in zip(chosen.schemes, ours, strict=True):
        entry: dict[str, Any] = {"scheme": scheme, "quantkit": measured}
        folder = config_folder(scheme, chosen.size, chosen.work)
        entry["vLLM"] = asked(vllm, folder, chosen.site)
        if chosen.sglang:
            entry["SGLang"] = asked(sglang, folder, chosen.sglang)
        entries.append(entry)
        print(json.dumps(entry), flush=True)
        chosen.json.write_text(json.dumps(document, indent=1))
    heads = [f"prefill {b} × {n}" for b, n in PREFILLS] + [f"decoding {b}" for b in DECODES]
    print("\n".join(table(["scheme", "by", *heads], rows(entries))))


if __name__ == "__main__":
    main()
