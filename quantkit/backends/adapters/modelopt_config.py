"""ModelOpt's quantization config of a job, and the check that the model really follows it."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export.registry import ExportContext, PrepareMoEInputsRegistry
from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

from quantkit.backends.adapters.common import usual_scheme
from quantkit.backends.adapters.places import Place, expert_blocks, fused_tensors
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

_BLOCK = re.compile(r"\.\d+\.")
_FORMATS = ("*weight_quantizer", "*input_quantizer")
_SCALING_ALGORITHMS = ("smoothquant", "awq_lite", "awq_full")
"""Algorithms that give every layer a scale of its input channels, found with the data."""


def quant_config(job: Job, model: torch.nn.Module, found: Mapping[str, Place]) -> dict[str, Any]:
    """The config for `mtq.quantize` that quantizes exactly the layers of the plan, at `found`.

    The library's lists of names to leave alone are not used: the plan is the authority, so every
    other module is switched off by its exact name. Classes that it leaves alone (batch norms,
    activations) stay off.
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
    planned = {place.module for place in found.values() if not place.parameter}
    planned |= set(fused_tensors(model))
    off = {f"{name}.*" for name in set(_childless(model)) - planned}
    off |= set(_experts_off(model, found))
    entries += [{"quantizer_name": name, "enable": False} for name in sorted(off)]
    config = {"quant_cfg": entries, "algorithm": _layer_by_layer(algorithm, job, found)}
    if job.kv_cache != "none":
        kv_preset = getattr(mtq, KV_PRESETS[job.kv_cache])
        config = update_quant_cfg_with_kv_cache_quant(config, kv_preset["quant_cfg"])
    return config


def _layer_by_layer(algorithm: Any, job: Job, found: Mapping[str, Place]) -> Any:
    """The algorithm as it keeps a block on the device for all of its samples, if it can.

    It then sees the decoder blocks alone, so a layer outside of them needs whole passes; so does
    SmoothQuant, whose blocks would be shown what earlier ones were smoothed to.
    """
    inside = all(_BLOCK.search(f".{place.module}") for place in found.values())
    if job.placement != "layerwise" or not (job.tokens and inside) or _method(algorithm) != "max":
        return algorithm
    stated = algorithm if isinstance(algorithm, dict) else {"method": algorithm}
    kept = {"checkpoint_dir": job.resume_folder} if job.resume_folder else {}
    return {**stated, "layerwise": {"enable": True, "calib_mutates_weights": False, **kept}}


def _experts_off(model: torch.nn.Module, found: Mapping[str, Place]) -> Iterator[str]:
    """Patterns of the quantizers of fused experts that the plan leaves alone."""
    planned = planned_names(model, found)
    for name, tensors in fused_tensors(model).items():
        for tensor, count in tensors.items():
            names = [f"{name}.{tensor}.{index}" for index in range(count)]
            if not planned.intersection(names):
                yield f"{name}.{tensor}_*"
            else:
                left = [index for index in range(count) if names[index] not in planned]
                yield from (f"{name}.{tensor}_weight_quantizers.{index}" for index in left)


def planned_names(model: torch.nn.Module, found: Mapping[str, Place]) -> set[str]:
    """What `quantized_layers` must find: modules, and `module.tensor.expert` of fused experts."""
    tensors = fused_tensors(model)
    names = set()
    for place in found.values():
        if not place.parameter:
            names.add(place.module)
            continue
        count = tensors[place.module][place.parameter]
        experts = range(count) if place.expert is None else [place.expert]
        names |= {f"{place.module}.{place.parameter}.{expert}" for expert in experts}
    return names


def check_calibrated(config: dict[str, Any], model: torch.nn.Module) -> int:
    """How many modules were calibrated with data.

    Raises JobError when an enabled quantizer that needs a range has none, or one that is not
    finite, or when a layer got no scale of its input channels from an algorithm that gives one.
    """
    method = _method(config["algorithm"])
    missing, broken, calibrated = [], [], 0
    for name, layer in quantized_layers(model).items():
        with_data = [q.amax for q in layer.inputs if _needs_amax(q)]
        if method in _SCALING_ALGORITHMS:
            with_data.append(layer.input_holder.pre_quant_scale)
        calibrated += bool(with_data)
        ranges = [q.amax for q in layer.weights if _needs_amax(q)] + with_data
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


def keep_blocks(
    model: torch.nn.Module, found: Mapping[str, Place], blocks: Collection[str]
) -> list[str]:
    """Switch the experts of these blocks off; the layers of the plan that so stay in 16 bit."""
    names = expert_blocks(found)
    modules = {module for module, block in names.items() if block in blocks}
    for name, quantizer in model.named_modules():
        inside = any(name.startswith(f"{module}.") for module in modules)
        if inside and isinstance(quantizer, TensorQuantizer):
            quantizer.disable()
    return [layer for layer, place in found.items() if place.parameter and place.module in modules]


def leave_fused(model: torch.nn.Module, kept: Iterable[Place]) -> None:
    """Give fused experts that the checkpoint holds fused, and that stay in 16 bit, their own class
    back: the export takes apart whatever has quantizers."""
    modules = {place.module for place in kept if place.parameter and place.expert is None}
    for name in sorted(modules):
        module = model.get_submodule(name)
        if isinstance(module, DynamicModule):
            module.export()
        PrepareMoEInputsRegistry.register(type(module).__name__)(_nothing_to_prepare)


def _nothing_to_prepare(name: str, module: torch.nn.Module, context: ExportContext) -> None:
    """Experts in 16 bit have no ranges."""


@dataclass(frozen=True)
class QuantizedLayer:
    """The quantizers of a layer, or of one expert of a fused tensor (whose input is all experts').

    input_holder: the module or sequence that the quantizers of the input are kept in.
    """

    weight_holder: Any
    input_holder: Any

    @property
    def weights(self) -> list[Any]:
        return _leaves(self.weight_holder)

    @property
    def inputs(self) -> list[Any]:
        return _leaves(self.input_holder)


def quantized_layers(model: torch.nn.Module) -> dict[str, QuantizedLayer]:
    """Layers with an enabled quantizer of the weight or input: modules by their names, experts of
    fused tensors as `module.tensor.expert`."""
    found = {}
    for name, module in model.named_modules():
        for tensor in ("", "gate_up_proj", "up_proj", "down_proj"):
            stem = f"{tensor}_" if tensor else ""
            inputs = getattr(module, f"{stem}input_quantizer", None)
            one = getattr(module, f"{stem}weight_quantizer", None)
            several = getattr(module, f"{stem}weight_quantizers", None)
            if tensor and inputs is not None:
                weights = list(several) if several is not None else [one] * _experts(module, tensor)
                layers = {
                    f"{name}.{tensor}.{index}": QuantizedLayer(weight, inputs)
                    for index, weight in enumerate(weights)
                }
                own = several is not None
            else:
                layers, own = {name: QuantizedLayer(one, inputs)}, False
            for key, layer in layers.items():
                asked = layer.weights if own else [*layer.weights, *layer.inputs]
                if any(quantizer.is_enabled for quantizer in asked):
                    found[key] = layer
    return found


def _experts(module: Any, tensor: str) -> int:
    return int(getattr(module, tensor).shape[0])


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


def _childless(model: torch.nn.Module) -> Iterator[str]:
    """Names of the modules without children (ModelOpt has quantized LayerNorms and poolings
    too)."""
    for name, module in model.named_modules():
        if not any(module.children()):
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
