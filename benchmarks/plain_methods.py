"""Methods as a plain script of each library would do them; quantkit is not imported.

    python benchmarks/plain_methods.py METHOD MODEL TOKENS OUT SETTINGS

TOKENS is a safetensors file with input_ids and attention_mask; SETTINGS is JSON with batch_size,
group_size, iters and practice (msModelSlim's own words for the method). Prints one
JSON line: the seconds from loading to saving, imports left out, those of all processors, and the
peak of resident bytes.
msModelSlim's interpreter runs this file too, so only torch and safetensors are imported above.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

import torch
from safetensors.torch import load_file

TOWERS = ("vision_model", "connector")
"""Parts of the names of what stays in 16 bit beside a language model (Idefics3)."""
IGNORED = ["lm_head", *(f"re:.*{part}.*" for part in TOWERS)]

Job = tuple[str, dict[str, torch.Tensor], str, dict[str, Any]]
Script = Callable[[Job], None]
Modifier = Callable[[dict[str, Any]], Any]


def batches(tokens: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    starts = range(0, len(tokens["input_ids"]), size)
    return [{key: value[s : s + size].clone() for key, value in tokens.items()} for s in starts]


def load(model: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sees = hasattr(AutoConfig.from_pretrained(model), "vision_config")
    maker: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return maker.from_pretrained(model, dtype="auto")


def llmcompressor(modifier: Modifier, calibrated: bool = True) -> Script:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    def run(job: Job) -> None:
        source, tokens, out, settings = job
        model = load(source)
        model.config.attn_implementation = "eager"  # or a Mixtral is calibrated without its mask
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


def llmcompressor_preset(scheme: str, calibrated: bool) -> Script:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    def modifier(_: dict[str, Any]) -> Any:
        return QuantizationModifier(scheme=scheme, targets=["Linear"], ignore=IGNORED)

    return llmcompressor(modifier, calibrated)


def integer_groups(settings: dict[str, Any]) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=settings["group_size"]
    )
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def llmcompressor_gptq() -> Script:
    from llmcompressor.modifiers.gptq import GPTQModifier

    def modifier(settings: dict[str, Any]) -> Any:
        return GPTQModifier(config_groups=integer_groups(settings), ignore=IGNORED)

    return llmcompressor(modifier)


def llmcompressor_autoround() -> Script:
    from llmcompressor.modifiers.autoround import AutoRoundModifier

    def modifier(settings: dict[str, Any]) -> Any:
        return AutoRoundModifier(
            config_groups=integer_groups(settings), ignore=IGNORED, iters=settings["iters"],
            batch_size=settings["batch_size"], enable_torch_compile=False,
        )  # fmt: skip

    return llmcompressor(modifier)


def gptqmodel() -> Script:
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


def autoround(scheme: str | None, layout: str) -> Script:
    """`scheme` is the library's name of one; None is symmetric int4 in groups."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    def run(job: Job) -> None:
        source, tokens, out, settings = job
        given, size = tokens["input_ids"], settings["batch_size"]
        named = {"scheme": scheme} if scheme else {
            "bits": 4, "sym": True, "group_size": settings["group_size"],
        }  # fmt: skip
        tuner = AutoRound(
            load(source), AutoTokenizer.from_pretrained(source), **named, iters=settings["iters"],
            nsamples=len(given),
            seqlen=given.shape[1], dataset=batches(tokens, size), batch_size=size,
            device_map="cpu", enable_torch_compile=False, seed=0,
        )  # fmt: skip
        tuner.quantize_and_save(out, format=layout)

    return run


def modelopt(preset: str, calibrated: bool = True) -> Script:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    def run(job: Job) -> None:
        source, tokens, out, settings = job
        model = load(source)
        config = copy.deepcopy(getattr(mtq, preset))
        config["quant_cfg"] += [{"quantizer_name": f"*{part}*", "enable": False} for part in TOWERS]
        if preset in ("INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG"):
            set_group(config, settings["group_size"])

        def calibrate(inner: Any) -> None:
            with torch.no_grad():
                for batch in batches(tokens, settings["batch_size"]):
                    inner(**batch, use_cache=False, logits_to_keep=1)

        mtq.quantize(model, config, calibrate if calibrated else None)
        export_hf_checkpoint(model, export_dir=out)

    return run


def set_group(config: dict[str, Any], size: int) -> None:
    for entry in config["quant_cfg"]:
        formats = entry.get("cfg") or []
        for part in formats if isinstance(formats, list) else [formats]:
            if (part.get("block_sizes") or {}).get(-1):
                part["block_sizes"][-1] = size


def msmodelslim() -> Script:
    """Its quantization service with a configuration; its command line asks questions on stdin."""
    from msmodelslim.core.const import DeviceType
    from msmodelslim.core.context import ContextFactory
    from msmodelslim.core.practice.interface import PracticeConfig
    from msmodelslim.core.quant_service.modelslim_v1.quant_service import (
        ModelslimV1QuantService,
        ModelslimV1QuantServiceConfig,
    )
    from msmodelslim.model import PluginModelFactory
    from msmodelslim.utils.security.model import SafeGenerator

    class Texts:
        def get_dataset_by_name(self, _: str) -> list[Any]:
            return []

    def run(job: Job) -> None:
        source, tokens, out, settings = job
        SafeGenerator.get_tokenizer_from_pretrained = staticmethod(lambda **_: None)
        adapter = PluginModelFactory().create("default", Path(source), False)
        samples = [[b["input_ids"], b["attention_mask"]] for b in batches(tokens, 1)]
        adapter.handle_dataset = lambda *_: samples
        service = ModelslimV1QuantService(
            ModelslimV1QuantServiceConfig(), Texts(), ContextFactory(enable_debug=False)
        )
        practice = PracticeConfig.model_validate(settings["practice"])
        service.quantize(practice.extract_quant_config(), adapter, Path(out), DeviceType.CPU)

    return run


METHODS: dict[str, Callable[[], Script]] = {
    "llmcompressor_fp8_dynamic": partial(llmcompressor_preset, "FP8_DYNAMIC", False),
    "llmcompressor_w4a16": llmcompressor_gptq,
    "llmcompressor_w4a16_autoround": llmcompressor_autoround,
    "llmcompressor_nvfp4": partial(llmcompressor_preset, "NVFP4", True),
    "llmcompressor_nvfp4a16": partial(llmcompressor_preset, "NVFP4A16", False),
    "llmcompressor_mxfp4": partial(llmcompressor_preset, "MXFP4", False),
    "gptqmodel_w4a16": gptqmodel,
    "autoround_w4a16": partial(autoround, None, "auto_round"),
    "autoround_nvfp4": partial(autoround, "NVFP4", "llm_compressor"),
    "autoround_mxfp4": partial(autoround, "MXFP4", "llm_compressor"),
    "autoround_gguf_q4_k_m": partial(autoround, "GGUF:Q4_K_M", "gguf:q4_k_m"),
    "modelopt_fp8": partial(modelopt, "FP8_DEFAULT_CFG"),
    "modelopt_nvfp4": partial(modelopt, "NVFP4_DEFAULT_CFG"),
    "modelopt_nvfp4_mlp_only": partial(modelopt, "NVFP4_MLP_ONLY_CFG"),
    "modelopt_int4_awq": partial(modelopt, "INT4_AWQ_CFG"),
    "modelopt_w4a16_nvfp4": partial(modelopt, "W4A16_NVFP4_CFG", False),
    "modelopt_w4a8_awq": partial(modelopt, "W4A8_AWQ_BETA_CFG"),
    "msmodelslim_w4a8_dynamic": msmodelslim,
    "msmodelslim_w4a4_dynamic": msmodelslim,
}


def main() -> None:
    method, model, tokens, out, settings = sys.argv[1:]
    run = METHODS[method]()  # imports the library
    Path("/proc/self/clear_refs").write_text("5")
    start, used = time.monotonic(), time.process_time()
    torch.manual_seed(0)
    run((model, load_file(tokens), out, json.loads(settings)))
    seconds, used = time.monotonic() - start, time.process_time() - used
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    told = {"seconds": seconds, "cpu_seconds": used, "peak_rss_bytes": int(peak) * 1024}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
