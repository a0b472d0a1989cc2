"""AutoRound: tuned rounding, exported to the layout that the recipe names."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.compressors import base, shard_writer
from auto_round.export import utils
from auto_round.special_model_handler import update_module
from auto_round.utils import is_mllm_model
from auto_round.utils.device_manager import get_ar_device
from auto_round.utils.missing_tensors import copy_missing_tensors_from_source
from transformers import AutoTokenizer

from quantkit.backends.adapters.autoround_gguf import keep_byte_level
from quantkit.backends.adapters.autoround_resume import go_on
from quantkit.backends.adapters.common import (
    bits_and_group,
    check_followed,
    logs_as_notes,
    packed_modules,
    seed_everything,
    usual_scheme,
    warnings_as_notes,
)
from quantkit.backends.adapters.experts_seen import ExpertsSeen, settled
from quantkit.backends.adapters.placed import empty_model, load_placed
from quantkit.backends.adapters.seen_tokens import SeenTokens, Tokens
from quantkit.backends.adapters.separate_layers import SeparateLayers
from quantkit.backends.adapters.settings_names import name_settings
from quantkit.backends.process.job import Job, JobError, Reporter, Result

_PRESETS = {"nvfp4": "NVFP4", "mxfp4": "MXFP4", "gguf_q4_k_m": "GGUF:Q4_K_M"}
"""Schemes that the library knows by a name; the others are integers."""
_FORMATS = {"gguf": "gguf:q4_k_m"}
_BEST_ITERS = 1000
_CODES = ("qweight", "weight_packed", "weight_scale")


def run(job: Job, report: Reporter, result: Result) -> None:
    """Quantize `job.model` and export it into `job.out`, without the library's sub-folder."""
    seed_everything(job)
    _keep_bfloat16()
    _keep_names()
    base.get_predefined_ignore_layers = lambda _: []  # the plan says what stays in 16 bit
    with warnings_as_notes(report), logs_as_notes("autoround", report):
        report.stage("load")
        layerwise = job.placement == "layerwise"
        resident = replace(job, placement="resident")
        model: Any = empty_model(job) if layerwise else load_placed(resident)
        layers = SeparateLayers(model, job)
        tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
        tokens = Tokens(job) if job.tokens else None
        witness = SeenTokens(tokens, report)
        arguments = _arguments(job, layers, model, tokens)
        if model.config.get_text_config() is not model.config or is_mllm_model(job.model):
            # Asked for with such models, and used by data sets of the library's own alone.
            arguments["processor"] = tokenizer
        if layerwise:  # the library then builds the model itself, and reads a block at a time
            os.environ["AR_DISK_STREAM_MODEL"] = "1"
            tuner = AutoRound(job.model, tokenizer, **arguments)
            model = tuner.model_context.model
        else:
            tuner = AutoRound(model, tokenizer, **arguments)
        update_module(model, cleanup_original=False)
        layers.check_linear(model, job)
        experts = ExpertsSeen(model, layers.blocks, tokens, job.batch_size, once=True)
        layout = _format(job)
        if layout == "gguf":
            keep_byte_level(job, report)
        elif job.resume_folder and _saves_block_by_block(job, model):
            go_on(job, model, experts)
        with witness.watch(model, "quantize"), experts.watch(feed=False):
            tuner.quantize_and_save(job.out, format=_FORMATS.get(layout, layout))
    _flatten(Path(job.out))
    quantized = set(layers.written)
    if layout != "gguf":  # whose types follow the layer's role, not the plan
        layers.rename(Path(job.out))
        copy_missing_tensors_from_source(job.model, job.out)
        name_settings(Path(job.out), layers)
        quantized = packed_modules(job.out, *_CODES)
        check_followed(job, quantized, layers.written)
    if tokens is not None:
        result.calibration = witness.summary(len(quantized))
        result.experts = settled(job, experts.summary())


def _saves_block_by_block(job: Job, model: torch.nn.Module) -> bool:
    """Whether the library writes each block as soon as it is tuned, so that it can go on.

    True of integers in its own packed layouts when no layer outside of the blocks is quantized
    (`is_immediate_saving`); elsewhere a resumed run would miss the blocks that were finished.
    """
    blocks = all(".layers." in name for name in job.layers)
    tuned = job.options.get("iters", 200) != 0
    packed = _format(job) in ("auto_round", "auto_gptq", "auto_awq")
    return blocks and tuned and packed and type(model).__name__.endswith("ForCausalLM")


def _keep_bfloat16() -> None:
    """The same checkpoint on every CPU.

    Without bfloat16 instructions AutoRound casts the model to float32 and writes all that is not
    quantized so, beside a config.json that says otherwise; no option of its own prevents that
    (`ModelContext._set_amp_dtype`). torch computes bfloat16 on every CPU.
    """
    get_ar_device("cpu")._bf16_supported = True


def _keep_names() -> None:
    """Tensors are written by the names that they have in memory, and renamed at the end.

    The library looks for what it has written by these, wherever it wrote others, and writes the
    experts of a family that Transformers renames (Mixtral) a second time, into another shard.
    What of the source is in no file (layers that Transformers does not build) is looked for by
    these names too, so only after that.
    """
    shard_writer.revert_checkpoint_conversion_mapping = lambda name, _: name
    utils.copy_missing_tensors_from_source = lambda **_: None


def _format(job: Job) -> str:
    name = usual_scheme(job).name
    default = (
        "gguf"
        if name.startswith("gguf")
        else ("llm_compressor" if name in _PRESETS else "auto_round")
    )
    return str(job.options.get("format", default))


def _arguments(
    job: Job, layers: SeparateLayers, model: Any, tokens: Tokens | None
) -> dict[str, Any]:
    usual = usual_scheme(job)
    preset = _PRESETS.get(usual.name)
    scheme = {"scheme": preset} if preset else bits_and_group(usual.weight)
    iters = job.options.get("iters", 200)
    arguments: dict[str, Any] = {
        **scheme,
        "iters": _BEST_ITERS if iters == "best" else iters,
        "layer_config": _layer_config(job, layers, model) or None,
        "batch_size": job.batch_size,
        "device_map": ",".join(job.devices) if job.placement == "spread" else job.device,
        "low_gpu_mem_usage": job.placement == "layerwise",
        "enable_torch_compile": False,
        "seed": job.seed,
    }
    if tokens is not None:
        arguments["dataset"] = tokens.batches(job.batch_size)
        arguments |= {"nsamples": len(tokens), "seqlen": tokens.ids.shape[1]}
    passed = ("lr", "minmax_lr", "disable_opt_rtn")
    return arguments | {key: job.options[key] for key in passed if key in job.options}


def _layer_config(job: Job, layers: SeparateLayers, model: Any) -> dict[str, dict[str, Any]]:
    """Layers that differ from the job's scheme: left in 16 bit, or of another number format."""
    scheme = usual_scheme(job)
    others: dict[str, dict[str, Any]] = {}
    if scheme.name not in _PRESETS:
        usual = bits_and_group(scheme.weight)
        numbers = {name: bits_and_group(own.weight) for name, own in layers.planned.items()}
        others = {name: number for name, number in numbers.items() if number != usual}
    head = model.get_output_embeddings()
    if scheme.name.startswith("gguf"):
        return others
    modules = dict(model.named_modules())
    kept = [
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear) and module is not head and name not in layers.planned
    ]
    apart = [name for name in layers.kept if name not in modules]  # experts, one by one
    return others | {name: {"bits": 16, "act_bits": 16} for name in (*kept, *apart)}


def _flatten(out: Path) -> None:
    """Move what the library wrote into a sub-folder of its own naming up into `out`."""
    made = [path.parent for pattern in ("config.json", "*.gguf") for path in out.rglob(pattern)]
    if not made:
        raise JobError(
            "AutoRound left neither a config.json nor a GGUF file.",
            hint="read the log",
            code="autoround.no_output",
        )
    if made[0] == out:
        return
    for path in made[0].iterdir():
        shutil.move(path, out / path.name)
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
