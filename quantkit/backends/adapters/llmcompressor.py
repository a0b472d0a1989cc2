"""LLM Compressor: one call of `oneshot`; writes compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import (
    disable_onloading,
    load_offloaded_model,
    set_onload_device,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import repack_moe
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from loguru import logger
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from quantkit.backends.adapters.common import (
    check_followed,
    folded,
    modules_by_scheme,
    norms,
    seed_everything,
    telling,
    usual_scheme,
    warnings_as_notes,
)
from quantkit.backends.adapters.data_parallel import joined, of_all_ranks, share
from quantkit.backends.adapters.experts_seen import ExpertsSeen, settled
from quantkit.backends.adapters.kept_lists import complete_lists
from quantkit.backends.adapters.linear_experts import (
    checkpoint_names,
    others,
    separate_experts,
)
from quantkit.backends.adapters.placed import load_placed, offload_removed
from quantkit.backends.adapters.places import expert_blocks, kept_layers, locate
from quantkit.backends.adapters.seen_tokens import SeenTokens, Tokens
from quantkit.backends.process.job import Job, JobInputError, Reporter, Result
from quantkit.checkpoint.network.norm_readers import smoothable
from quantkit.checkpoint.schemes import NumberFormat


def run(job: Job, report: Reporter, result: Result) -> None:
    """Quantize `job.model` and save it, compressed, into `job.out`."""
    seed_everything(job)
    with warnings_as_notes(report), _log_as_notes(report), offload_removed(job), joined(job):
        report.stage("load")
        model = _load(job)
        with disable_onloading():  # names and shapes of all weights at once
            found, kept = locate(model, job), kept_layers(model, job)
        mixture = any(place.parameter for place in found.values())
        layers = separate_experts(model, found, rename=mixture)
        planned = {name: job.layers[layer] for layer, names in layers.items() for name in names}
        tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
        before = norms(model)
        modifiers = _modifiers(job, model, planned, others(model, planned))
        fallbacks = [m._rtn_fallback_module_names for m in modifiers if isinstance(m, GPTQModifier)]
        call = {"model": model, "recipe": modifiers, "processor": tokenizer}
        if job.tokens is None:
            report.stage("quantize")
            oneshot(**call)
        else:
            _calibrate(call, job, report, result, planned, expert_blocks(found))
        check_followed(job, _quantized(model), planned)
        result.folds = folded(before, norms(model))
        for name in [name for names in fallbacks for name in names]:
            report.note(f"{name}: rounded to nearest, its Hessian could not be inverted")
        report.stage("save")
        if not mixture:
            repack_moe(model)
        if job.placement == "layerwise":  # saving would bring all weights to the accelerator
            set_onload_device(model, torch.device("cpu"))
        model.save_pretrained(job.out, save_compressed=True, max_shard_size=job.shard_size)
        if not job.rank:
            complete_lists(Path(job.out), kept, checkpoint_names({**found, **kept}))


def _load(job: Job) -> Any:
    """The model, offloaded in the library's own way where its weights do not stay on the device."""
    if job.placement == "resident":
        return load_placed(job)
    with load_offloaded_model(extra_cpu_mem=0):
        return load_placed(job)


def _calibrate(
    call: dict[str, Any],
    job: Job,
    report: Reporter,
    result: Result,
    planned: Collection[str],
    blocks: Mapping[str, str],
) -> None:
    tokens = share(Tokens(job), job)
    witness = SeenTokens(tokens, report)
    experts = ExpertsSeen(call["model"], blocks, tokens, job.batch_size)
    mixed = 0 < len(tokens.pictures) < len(tokens)
    if mixed:
        call = {**call, "pipeline": _for_mixed_samples(call["recipe"], report)}
    # A loader of our own keeps order, length and padding; a data set would be shuffled and cut.
    loader: DataLoader[Any] = DataLoader(tokens.batches(job.batch_size), batch_size=None)  # type: ignore[arg-type]
    with (
        witness.watch(call["model"], "calibrate", planned),
        experts.watch(feed=False),
        _masked(call["model"]),
    ):
        oneshot(
            **call,
            dataset=loader,
            num_calibration_samples=len(tokens),
            moe_calibrate_all_experts=job.experts == "all",
        )
    result.calibration = of_all_ranks(witness.summary(), witness.seen, job)
    result.experts = settled(job, experts.summary())


@contextmanager
def _masked(model: torch.nn.Module) -> Iterator[None]:
    """Let no token see those after it.

    The library traces the model with eager attention. Where a mask comes from another function than
    `create_causal_mask` by that name (Mixtral, Mistral, Qwen3-MoE, Phi), it gives that function a
    copy of the config, made of what `to_dict` has: without the implementation of attention, whose
    default then leaves the mask to SDPA, and eager attention has none.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        config.attn_implementation = "eager"
    try:
        yield
    finally:
        for config in configs.values():
            del config.attn_implementation


def _for_mixed_samples(modifiers: list[Any], report: Reporter) -> str:
    """The library's pipeline for samples of which some have pictures: the sequential one traces the
    model with the first sample, and cannot run others of another kind."""
    if len(modifiers) > 1:
        raise JobInputError(
            "LLM Compressor cannot smooth and round with samples of which only some have pictures.",
            hint="a calibration with pictures in every sample, or in none: quantkit calibration "
            "list",
            code="llmcompressor.mixed_samples",
        )
    report.note(
        "some samples have pictures: every layer is calibrated with the 16-bit model's inputs, not "
        "with those of the quantized layers before it"
    )
    return "basic"


def _modifiers(
    job: Job, model: torch.nn.Module, planned: Mapping[str, Any], ignore: list[str]
) -> list[Any]:
    """The library's recipe: an optional fold, then what rounds the weights."""
    groups = {f"group_{number}": scheme for number, scheme in enumerate(_groups(planned))}
    target: dict[str, Any] = {"config_groups": groups, "ignore": ignore}
    if job.kv_cache == "fp8":
        target["kv_cache_scheme"] = QuantizationArgs(
            num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False
        )
    options = job.options
    algorithm = options.get("algorithm") or ("gptq" if usual_scheme(job).weight.is_int else "rtn")
    modifiers: list[Any] = []
    if "smoothing_strength" in options:
        mappings, strength = _smoothing(model, planned), options["smoothing_strength"]
        modifiers.append(SmoothQuantModifier(smoothing_strength=strength, mappings=mappings))
    if algorithm == "gptq":
        more = {key: options[key] for key in ("dampening_frac",) if key in options}
        if "actorder" in options:
            order = options["actorder"]
            more["actorder"] = None if order == "none" else order
        return [*modifiers, GPTQModifier(**target, **more)]
    if algorithm == "autoround":
        more = {"iters": options["iters"]} if "iters" in options else {}
        compiled = job.device != "cpu"
        tuned = AutoRoundModifier(
            **target, **more, batch_size=job.batch_size, enable_torch_compile=compiled
        )
        return [*modifiers, tuned]
    if algorithm == "awq":
        modifiers.append(AWQModifier())
    return [*modifiers, QuantizationModifier(**target)]


def _smoothing(model: torch.nn.Module, planned: Collection[str]) -> list[Any]:
    """The library's mappings, (layers to balance, norm to smooth), by structure.

    Its own are of architectures, and by default of Llama's names: they take a tower's layers too,
    Gemma's norm after attention, and a norm that a router reads, which stays as it is.
    """
    widths = {name: getattr(module, "in_features", 0) for name, module in model.named_modules()}
    alike: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for norm, readers in smoothable(widths, planned).items():
        block, _, leaf = norm.rpartition(".")
        inside = tuple(name.removeprefix(f"{block}.") for name in readers)
        alike.setdefault((inside, leaf), []).append(re.escape(block))
    return [
        ([_in_each(blocks, name) for name in readers], _in_each(blocks, leaf))
        for (readers, leaf), blocks in alike.items()
    ]


def _in_each(blocks: Sequence[str], name: str) -> str:
    return f"re:(?:{'|'.join(blocks)})\\.{re.escape(name)}$"


def _groups(planned: Mapping[str, Any]) -> Iterator[QuantizationScheme]:
    """One group a scheme; the only group of a plan names the class, several name their modules."""
    schemes = modules_by_scheme(planned)
    for scheme, names in schemes.items():
        yield QuantizationScheme(
            targets=["Linear"] if len(schemes) == 1 else names,
            weights=arguments(scheme.weight, weight=True),
            input_activations=arguments(scheme.input) if scheme.input else None,
        )


def arguments(number: NumberFormat, *, weight: bool = False) -> QuantizationArgs:
    """A number format in compressed-tensors' words; equal to its presets where there is one."""
    two_level, shared_exponent = number.scale == "e4m3", number.scale == "e8m0"
    values: dict[str, Any] = {
        "num_bits": number.bits,
        "type": "int" if number.is_int else "float",
        "strategy": "tensor_group" if two_level else number.granularity,
        "symmetric": number.symmetric,
        "dynamic": number.dynamic,
        "group_size": number.group_size,
        "block_structure": list(number.block) if number.block else None,
    }
    if two_level:
        values["scale_dtype"] = values["zp_dtype"] = torch.float8_e4m3fn
        if not weight:
            values["dynamic"] = "local"  # the group's scale while serving, the tensor's from data
            values["observer"] = "static_minmax"
    if shared_exponent:
        values["scale_dtype"] = values["zp_dtype"] = torch.uint8
    if values["dynamic"] is True:
        values["observer"] = None
    return QuantizationArgs(**{key: value for key, value in values.items() if value is not None})


def _quantized(model: torch.nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "quantization_scheme", None), "weights", None)
    }


@contextmanager
def _log_as_notes(report: Reporter) -> Iterator[None]:
    """Pass on what the library logs as a warning and that tells of something left out."""

    def note(record: Any) -> None:
        text = " ".join(str(record["message"]).split())
        if record["level"].no >= WARNING and telling(text):
            report.note(text)

    # a patcher, since the library replaces all handlers when it finds itself one of several ranks
    logger.configure(patcher=note)
    try:
        yield
    finally:
        logger.configure(patcher=lambda _: None)
