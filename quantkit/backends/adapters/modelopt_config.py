"""ModelOpt's quantization config of a job, and the check that the model really follows it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

from quantkit.backends.adapters.common import usual_scheme
from quantkit.backends.adapters.seen_tokens import never_ran
from quantkit.backends.process.job import Job, JobError, JobInputError

PRESETS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_dynamic": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_block_weight_only": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "w8a8": "INT8_SMOOTHQUANT_CFG",
    "w4a16": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4a16": "W4A16_NVFP4_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
}
"""Scheme → the library's config, of which the number formats and the algorithm are taken."""

KV_PRESETS = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}

_FORMATS = ("*weight_quantizer", "*input_quantizer")
_SCALING_ALGORITHMS = ("smoothquant", "awq_lite", "awq_full")
"""Algorithms that give every layer a scale of its input channels, found with the data."""


def quant_config(job: Job, model: torch.nn.Module) -> dict[str, Any]:
    """The config for `mtq.quantize` that quantizes exactly the modules of `job.layers`.

    The library's lists of names to leave alone are not used: the plan is the authority, so every
    other module with a weight is switched off by its exact name. Classes that it leaves alone
    (batch norms, activations) stay off.
    """
    preset = copy.deepcopy(getattr(mtq, PRESETS[usual_scheme(job).name]))
    algorithm = job.options.get("algorithm", preset["algorithm"])
    _check_device(job, algorithm)
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for entry in preset["quant_cfg"]:
        if entry["quantizer_name"] in _FORMATS and entry.get("cfg"):
            entries.append({**entry, "cfg": _with_group(entry["cfg"], job)})
        elif entry.get("parent_class"):
            entries.append(entry)
    off = set(job.keep) | set(_weighted(model)) - set(job.layers)
    entries += [{"quantizer_name": f"{name}.*", "enable": False} for name in sorted(off)]
    config = {"quant_cfg": entries, "algorithm": algorithm}
    if job.kv_cache != "none":
        kv_preset = getattr(mtq, KV_PRESETS[job.kv_cache])
        config = update_quant_cfg_with_kv_cache_quant(config, kv_preset["quant_cfg"])
    return config


def check_calibrated(config: dict[str, Any], model: torch.nn.Module) -> int:
    """How many modules were calibrated with data.

    Raises JobError when an enabled quantizer that needs a range has none, or one that is not
    finite, or when a layer got no scale of its input channels from an algorithm that gives one.
    """
    method = _method(config["algorithm"])
    missing, broken, calibrated = [], [], 0
    for name, module in quantized_layers(model).items():
        with_data = [
            quantizer.amax
            for quantizer in _leaves(module.input_quantizer)
            if _needs_amax(quantizer)
        ]
        if method in _SCALING_ALGORITHMS:
            with_data.append(module.input_quantizer.pre_quant_scale)
        calibrated += bool(with_data)
        ranges = [q.amax for q in _leaves(module.weight_quantizer) if _needs_amax(q)] + with_data
        if any(r is None for r in ranges):
            missing.append(name)
        elif not all(bool(torch.isfinite(r).all()) for r in ranges):
            broken.append(name)
    for name, quantizer in model.named_modules():
        if name.endswith(("k_bmm_quantizer", "v_bmm_quantizer")) and _needs_amax(quantizer):
            if quantizer.amax is None:
                missing.append(name)
            elif not bool(torch.isfinite(quantizer.amax).all()):
                broken.append(name)
    if missing:
        raise never_ran(f"{len(missing)} modules saw no calibration data: {missing[:3]}")
    if broken:
        raise JobError(
            f"The calibrated range of {len(broken)} modules is not finite: {broken[:3]}.",
            hint="another mixture or more samples: quantkit calibration list",
            code="calibration.not_finite",
        )
    return calibrated


def quantized_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Modules with an enabled weight or input quantizer, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(
            quantizer.is_enabled
            for kind in ("weight_quantizer", "input_quantizer")
            for quantizer in _leaves(getattr(module, kind, None))
        )
    }


def _check_device(job: Job, algorithm: Any) -> None:
    """AWQ runs the fake-quantized model, and ModelOpt's NVFP4 kernels exist on CUDA alone."""
    method, scheme = _method(algorithm), usual_scheme(job).name
    if job.device == "cpu" and scheme in ("nvfp4", "nvfp4a16") and "awq" in method:
        raise JobInputError(
            f"ModelOpt cannot run {method} with {scheme} on a CPU.",
            hint="add --device cuda, or take the algorithm max",
            code="modelopt.needs_cuda",
        )


def _method(algorithm: Any) -> str:
    """The name of an algorithm that is given by name, with parameters, or not at all."""
    return str(algorithm["method"] if isinstance(algorithm, dict) else algorithm)


def _weighted(model: torch.nn.Module) -> Iterator[str]:
    """Names of the modules without children that hold a parameter (ModelOpt has quantized
    LayerNorms too)."""
    for name, module in model.named_modules():
        if not any(module.children()) and any(True for _ in module.parameters(recurse=False)):
            yield name


def _with_group(cfg: Any, job: Job) -> Any:
    """A weight or input format with the scheme's group size in place of the preset's."""
    group = usual_scheme(job).weight.group_size
    parts = cfg if isinstance(cfg, list) else [cfg]
    for part in parts:
        blocks = part.get("block_sizes")
        if blocks and blocks.get(-1) and group:
            blocks[-1] = group
    return cfg


def _leaves(quantizer: Any) -> list[Any]:
    """The plain quantizers of a quantizer, which may be a sequence of them or absent."""
    if isinstance(quantizer, SequentialQuantizer):
        return list(quantizer)
    return [quantizer] if isinstance(quantizer, TensorQuantizer) else []


def _needs_amax(quantizer: Any) -> bool:
    """Whether an enabled quantizer takes its range from data (not while serving, not from MX)."""
    return bool(
        quantizer.is_enabled
        and not quantizer._dynamic
        and not quantizer.is_mx_format
        and not quantizer._use_constant_amax
    )
