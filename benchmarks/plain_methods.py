"""The 4-bit methods as a plain script of each library would do them; quantkit is not imported.

    python benchmarks/plain_methods.py METHOD MODEL TOKENS OUT SETTINGS

TOKENS is a safetensors file with input_ids and attention_mask; SETTINGS is JSON with batch_size,
group_size and iters. Prints one JSON line: the seconds from loading to saving, imports left out,
and the peak of resident bytes.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

import torch
from safetensors.torch import load_file

Job = tuple[str, dict[str, torch.Tensor], str, dict[str, Any]]


def batches(tokens: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    starts = range(0, len(tokens["input_ids"]), size)
    return [{key: value[s : s + size].clone() for key, value in tokens.items()} for s in starts]


def load(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="auto")


def llmcompressor(modifier: Callable[[dict[str, Any]], Any], calibrated: bool) -> Any:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    def run(job: Job) -> None:
        source, tokens, out, settings = job
        model = load(source)
        data: dict[str, Any] = {}
        if calibrated:
            given: Any = batches(tokens, settings["batch_size"])
            data = {
                "dataset": DataLoader(given, batch_size=None),
                "num_calibration_samples": len(tokens["input_ids"]),
            }
        processor = AutoTokenizer.from_pretrained(source)
        oneshot(model=model, recipe=[modifier(settings)], processor=processor, **data)
        model.save_pretrained(out, save_compressed=True)

    return run


def llmcompressor_w4a16() -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    def modifier(settings: dict[str, Any]) -> Any:
        weights = QuantizationArgs(
            num_bits=4, type="int", strategy="group", group_size=settings["group_size"]
        )
        group = QuantizationScheme(targets=["Linear"], weights=weights)
        return GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"])

    return llmcompressor(modifier, True)


def llmcompressor_nvfp4() -> Any:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return llmcompressor(
        lambda _: QuantizationModifier(scheme="NVFP4", targets=["Linear"], ignore=["lm_head"]), True
    )


def llmcompressor_mxfp4() -> Any:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return llmcompressor(
        lambda _: QuantizationModifier(scheme="MXFP4", targets=["Linear"], ignore=["lm_head"]),
        False,
    )


def gptqmodel_w4a16() -> Any:
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    def run(job: Job) -> None:
        source, tokens, out, settings = job
        config = GPTQConfig(
            bits=4, group_size=settings["group_size"], act_group_aware=True, device="cpu"
        )
        model = GPTQModel.load(source, config)
        rows = [
            {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
            for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
        ]
        model.quantize(rows, batch_size=settings["batch_size"], calibration_sort=None)
        model.save(out)

    return run


def autoround_w4a16() -> Any:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    def run(job: Job) -> None:
        source, tokens, out, settings = job
        given, size = tokens["input_ids"], settings["batch_size"]
        tuner = AutoRound(
            load(source), AutoTokenizer.from_pretrained(source), bits=4, sym=True,
            group_size=settings["group_size"], iters=settings["iters"], nsamples=len(given),
            seqlen=given.shape[1], dataset=batches(tokens, size), batch_size=size,
            device_map="cpu", enable_torch_compile=False, seed=0,
        )  # fmt: skip
        tuner.quantize_and_save(out, format="auto_round")

    return run


def modelopt_nvfp4() -> Any:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    def run(job: Job) -> None:
        source, tokens, out, settings = job
        model = load(source)

        def calibrate(inner: Any) -> None:
            with torch.no_grad():
                for batch in batches(tokens, settings["batch_size"]):
                    inner(**batch, use_cache=False, logits_to_keep=1)

        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, calibrate)
        export_hf_checkpoint(model, export_dir=out)

    return run


METHODS = {
    function.__name__: function
    for function in (
        llmcompressor_w4a16, llmcompressor_nvfp4, llmcompressor_mxfp4, gptqmodel_w4a16,
        autoround_w4a16, modelopt_nvfp4,
    )
}  # fmt: skip


def main() -> None:
    method, model, tokens, out, settings = sys.argv[1:]
    run = METHODS[method]()  # imports the library
    Path("/proc/self/clear_refs").write_text("5")
    start = time.monotonic()
    torch.manual_seed(0)
    run((model, load_file(tokens), out, json.loads(settings)))
    seconds = time.monotonic() - start
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": int(peak) * 1024}))


if __name__ == "__main__":
    main()
