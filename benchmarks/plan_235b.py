"""How long `quantkit plan` takes for Qwen3-235B-A22B from its config and index, weights absent.

    python benchmarks/plan_235b.py [RUNS]

Writes both files (94 layers × 128 experts, 36,945 names) into a temporary directory and times whole
processes: start, plan, eight verdicts, JSON. Prints the median and the best of RUNS (default 5),
wall clock and processor time, for the index and for the config alone.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quantkit.checkpoint.network.sizes import sizes
from quantkit.checkpoint.network.tensor_names import derived_names

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4096,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "vocab_size": 151936, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SHARDS = 118


def write(folder: Path, *, index: bool) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if index:
        names = derived_names(CONFIG, sizes(CONFIG))
        places = {
            name: f"model-{i * SHARDS // len(names) + 1:05d}-of-{SHARDS:05d}.safetensors"
            for i, name in enumerate(names)
        }
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def seconds(model: Path) -> tuple[float, float]:
    """Wall clock and processor seconds of one whole process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "plan", str(model), "--method", "rtn_fp8_block",
         "--engine", "vllm,sglang", "--tp", "1,2,4,8", "--gpu", "h100", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    verdicts = json.loads(done.stdout)["verdicts"]
    assert done.returncode == 1, done.stderr
    assert [v["tp"] for v in verdicts if not v["loads"]] == [8, 8], "1536 / 8 is no multiple of 128"
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        for what in ("config and index", "config alone"):
            model = write(Path(folder) / what.replace(" ", "-"), index="index" in what)
            found = [seconds(model) for _ in range(runs)]
            for name, values in zip(("wall", "processor"), zip(*found, strict=True), strict=True):
                line = f"median {statistics.median(values):.2f} s, best {min(values):.2f} s"
                print(f"{what}, {name}: {line}")


if __name__ == "__main__":
    main()
