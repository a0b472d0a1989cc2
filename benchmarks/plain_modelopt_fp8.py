"""FP8 with ModelOpt alone, as its own examples do it, with its stages timed.

`python plain_modelopt_fp8.py MODEL TOKENS OUT BATCH_SIZE`; the last line of stdout is JSON.
"""

import json
import sys
import time
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def peak_rss() -> int:
    """Peak resident bytes of this process (getrusage would begin at its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(model_dir: str, tokens: str, out: str, batch_size: int) -> None:
    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    loaded = time.monotonic()
    ids = load_file(tokens)["input_ids"]

    def forward(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for start in range(0, len(ids), batch_size):
                model(ids[start : start + batch_size])

    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, forward)
    calibrated = time.monotonic()
    export_hf_checkpoint(model, export_dir=out)
    seconds = {
        "load": loaded - start,
        "calibrate": calibrated - loaded,
        "export": time.monotonic() - calibrated,
    }
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak_rss()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
