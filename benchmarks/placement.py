"""Peak memory of calibrating methods by placement, beside the library's own layer-wise script.

    python benchmarks/placement.py MODEL OUT [--random 1.1 [--layers N] [--inner N]] [--method NAME]
        [--side SIDE] [--set KEY=VALUE]

Runs each method as `quantkit quantize` with each placement, and the library alone (`own`) as its
documentation does it layer by layer, and prints a JSON line a run: seconds, the peak of the tree of
processes (proportional set size), what the plan expected, and both as a multiple of the weights in
16 bit; the most that lay on the disk beside the finished output, and what the plan expected. OUT
must not exist; what is written there is removed after each run. With --random, MODEL is first
written: a random Llama of that size with the demo model's tokenizer and vocabulary.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_llama import SIZES, make

from quantkit.backends.streaming.memory import tree_memory
from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.directory import is_sidecar, open_checkpoint

METHODS = {
    "llmcompressor_w4a16": (),
    "modelopt_fp8": (),
    "autoround_w4a16": ("--set", "options.iters=1"),
    "gptqmodel_w4a16": (),
}
SIDES = ("resident", "layerwise", "own")
SAMPLES, LENGTH, BATCH = 4, 64, 2
LOOK_SECONDS = 0.2

OWN = {
    "llmcompressor_w4a16": """
import sys, torch
from compressed_tensors.offload import load_offloaded_model
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out, samples, length, batch = sys.argv[1:3] + [int(n) for n in sys.argv[3:]]
with load_offloaded_model(extra_cpu_mem=0):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="auto_offload",
        max_memory={"cpu": 300_000_000}, offload_folder=out + ".offload")
ids = torch.randint(5, 1000, (samples, length), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
oneshot(model=model, dataset=data, num_calibration_samples=samples, max_seq_length=length,
    batch_size=batch, recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]))
model.save_pretrained(out, save_compressed=True)
""",
    "modelopt_fp8": """
import sys, copy, torch
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
source, out, samples, length, batch = sys.argv[1:3] + [int(n) for n in sys.argv[3:]]
count = AutoConfig.from_pretrained(source).num_hidden_layers
outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
layers = {f"model.layers.{number}": "disk" for number in range(count)}
places = layers | dict.fromkeys(outside, "cpu")
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map=places,
    offload_folder=out + ".offload", offload_buffers=True)
ids = torch.randint(5, 1000, (samples, length), generator=torch.Generator().manual_seed(0))
config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
layerwise = {"enable": True, "calib_mutates_weights": False}
config["algorithm"] = {"method": "max", "layerwise": layerwise}
mtq.quantize(model, config, lambda m: [m(input_ids=part) for part in ids.split(batch)])
export_hf_checkpoint(model, export_dir=out)
""",
    "autoround_w4a16": """
import os, sys, torch
os.environ["AR_DISK_STREAM_MODEL"] = "1"
from auto_round import AutoRound
from transformers import AutoTokenizer
source, out, samples, length, batch = sys.argv[1:3] + [int(n) for n in sys.argv[3:]]
ids = torch.randint(5, 1000, (samples, length), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": p, "attention_mask": torch.ones_like(p)} for p in ids.split(batch)]
AutoRound(source, AutoTokenizer.from_pretrained(source), bits=4, group_size=128, sym=True, iters=1,
    dataset=data, nsamples=samples, seqlen=length, batch_size=batch, device_map="cpu",
    low_gpu_mem_usage=True, enable_torch_compile=False).quantize_and_save(out, format="auto_round")
""",
}
"""Method → the library's own script: SOURCE OUT SAMPLES LENGTH BATCH."""


def write_random(path: Path, size: str, **others: int) -> None:
    """A random Llama that the demo model's tokenizer fits."""
    demo = demo_model()
    vocab = json.loads((demo / "config.json").read_text())["vocab_size"]
    make(path, size, vocab=vocab, **others)
    for file in demo.iterdir():
        if is_sidecar(file.name):
            shutil.copy(file, path / file.name)


def watched(command: list[str], out: Path) -> tuple[int, float, int, int, str]:
    """Exit code, seconds, peak bytes of the tree and on the disk, and the end of what it said."""
    started, peak, disk = time.monotonic(), 0, 0
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as child:
            while child.poll() is None:
                peak = max(peak, tree_memory(child.pid))
                disk = max(disk, sum(map(on_disk, out.parent.glob(f"{out.name}*"))))
                time.sleep(LOOK_SECONDS)
        said.seek(0)
        seconds = time.monotonic() - started
        return child.returncode, seconds, peak, disk, said.read()[-2000:]


def on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder while others write and remove them."""
    done = subprocess.run(["du", "-sb", str(path)], capture_output=True, text=True, check=False)
    return int((done.stdout.split() or ["0"])[0])


def settings(method: str, more: list[str]) -> list[str]:
    """The flags that every run of a method gets."""
    calibration = {"samples": SAMPLES, "sequence_length": LENGTH, "batch_size": BATCH}
    sets = [f"calibration.{name}={value}" for name, value in calibration.items()]
    return [*[word for text in sets for word in ("--set", text)], *METHODS[method], *more]


def measure(model: Path, out: Path, method: str, side: str, more: list[str]) -> dict[str, Any]:
    """One run: its peak, and for a placement what the plan expected."""
    if side == "own":
        numbers = [str(number) for number in (SAMPLES, LENGTH, BATCH)]
        command = [sys.executable, "-c", OWN[method], str(model), str(out), *numbers]
    else:
        asked = ["--set", f"placement={side}", *settings(method, more)]
        command = [sys.executable, "-m", "quantkit", "quantize", str(model), "--method", method,
                   "--out", str(out), "--device", "cpu", *asked]  # fmt: skip
    code, seconds, peak, disk, said = watched(command, out)
    held = 2 * sum(info.elements for info in open_checkpoint(model).tensors.values())
    row = {"method": method, "side": side, "seconds": round(seconds, 1), "peak_bytes": peak,
           "model_bytes": held, "over_model": round(peak / held, 3)}  # fmt: skip
    if code:
        row |= {"failed": said}
    elif side != "own":
        placed = json.loads((out / "quantkit.json").read_text())["placement"]
        expected = placed["needs"][side]["host"]
        row |= {"expected_bytes": expected, "expected_over_peak": round(expected / peak, 3)}
        row |= {"disk_bytes": max(disk - on_disk(out), 0), "expected_disk_bytes": placed["disk"]}
    for path in (out, Path(f"{out}.offload"), Path(f"{out}.log")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--side", choices=SIDES, action="append")
    parser.add_argument("--random", choices=SIZES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--inner", type=int, help="Width of the MLP.")
    parser.add_argument("--set", action="append", default=[])
    chosen = parser.parse_args()
    if chosen.out.exists():
        parser.error(f"{chosen.out} exists")
    if chosen.random:
        others = {"layers": chosen.layers, "inner": chosen.inner}
        given = {name: value for name, value in others.items() if value}
        write_random(chosen.model, chosen.random, **given)
    more = [word for text in chosen.set for word in ("--set", text)]
    for method in chosen.method or METHODS:
        for side in chosen.side or SIDES:
            if side != "own" or method in OWN:
                print(json.dumps(measure(chosen.model, chosen.out, method, side, more)), flush=True)


if __name__ == "__main__":
    main()
