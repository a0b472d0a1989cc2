"""GPTQModel: GPTQ or AWQ, in the layouts of the same names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pools ask for two, whatever the machine

import torch
from gptqmodel import CheckpointConfig, GPTQModel
from gptqmodel.looper.checkpoint_store import CheckpointError
from gptqmodel.looper.gptq_checkpoint import validate_checkpoint_support
from gptqmodel.quantization.config import (
    AWQConfig,
    ExpertsRoutingBypass,
    GPTQConfig,
    MoEConfig,
)
from transformers import AutoConfig

from quantkit.backends.adapters.common import (
    bits_and_group,
    check_followed,
    packed_modules,
    seed_everything,
    usual_scheme,
    warnings_as_notes,
)
from quantkit.backends.adapters.experts_seen import ExpertsSeen, settled
from quantkit.backends.adapters.gptqmodel_experts import calibrated_experts
from quantkit.backends.adapters.gptqmodel_rows import offloads, taking_rows
from quantkit.backends.adapters.hf_config import auto_class
from quantkit.backends.adapters.seen_tokens import SeenTokens, Tokens
from quantkit.backends.adapters.separate_layers import SeparateLayers
from quantkit.backends.adapters.settings_names import name_settings
from quantkit.backends.process.job import Job, JobInputError, Reporter, Result

_GPTQ_OPTIONS = ("desc_act", "act_group_aware", "damp_percent", "mse", "format")
_IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")


def run(job: Job, report: Reporter, result: Result) -> None:
    """Quantize `job.model` and save it into `job.out`."""
    seed_everything(job)
    hf_config = _hf_config(job)
    with warnings_as_notes(report), taking_rows(job, hf_config):
        report.stage("load")
        layers = SeparateLayers(_skeleton(job, hf_config), job)
        config = _config(job, layers, offload=offloads(job, hf_config))
        model = GPTQModel.load(job.model, config, trust_remote_code=job.trust_remote_code)
        layers.check_linear(model.model, job)
        tokens = Tokens(job)
        experts = ExpertsSeen(model.model, layers.blocks, tokens, job.batch_size)
        witness = SeenTokens(tokens, report)
        rows = [
            {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
            for ids, mask in zip(tokens.ids, tokens.masks, strict=True)
        ]
        with (
            witness.watch(model.model, "quantize"),
            calibrated_experts(experts, layers.blocks, routed=job.experts == "routed"),
            _damage_told(),
        ):
            model.quantize(
                rows,
                batch_size=job.batch_size,
                calibration_sort=None,
                calibration_data_min_length=0,
                checkpoint=None if layers.blocks else _checkpoint(job, model),
            )
        _note_fallbacks(model.quant_log, config, report)
        report.stage("save")
        model.save(job.out, max_shard_size=job.shard_size)
        Path(job.out, "quant_log.csv").unlink(missing_ok=True)  # what it says is in the notes
    layers.rename(Path(job.out))
    name_settings(Path(job.out), layers)
    quantized = packed_modules(job.out, "qweight")
    check_followed(job, quantized, layers.written)
    result.calibration = witness.summary(len(quantized))
    result.experts = settled(job, experts.summary())


def _hf_config(job: Job) -> Any:
    return AutoConfig.from_pretrained(
        job.model, local_files_only=True, trust_remote_code=job.trust_remote_code
    )


def _skeleton(job: Job, config: Any) -> Any:
    """The model as Transformers builds it, without weights: the library's has other experts."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=job.trust_remote_code)


def _checkpoint(job: Job, model: Any) -> CheckpointConfig | None:
    """The library's own checkpoints of finished layers; None for what it cannot go on with."""
    if job.resume_folder is None:
        return None
    try:
        validate_checkpoint_support(model)
    except (NotImplementedError, ValueError):
        return None
    return CheckpointConfig(path=job.resume_folder)


@contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise JobInputError(
            f"GPTQModel cannot go on from its checkpoint of finished layers: {error}.",
            hint="start anew without --resume",
            code="resume.damaged",
        ) from error


def _config(job: Job, layers: SeparateLayers, *, offload: bool) -> Any:
    common = {
        **bits_and_group(usual_scheme(job).weight),
        "device": job.device,
        "dynamic": _dynamic(job, layers),
        "offload_to_disk": offload,
    }
    if offload:  # its default, a folder in the system's /tmp, outlives a killed worker
        common["offload_to_disk_path"] = str(Path("offload").absolute())
    if layers.blocks and job.experts == "all":
        common["moe"] = MoEConfig(routing=ExpertsRoutingBypass())
    if job.options.get("method") == "awq":
        return AWQConfig(**common)
    return GPTQConfig(**common, **{k: job.options[k] for k in _GPTQ_OPTIONS if k in job.options})


def _dynamic(job: Job, layers: SeparateLayers) -> dict[str, dict[str, Any]] | None:
    """Rules by module name, for what is left alone or has another number format.

    Modules outside of the decoder blocks (head, embeddings) are left alone without a rule.
    """
    usual = bits_and_group(usual_scheme(job).weight)
    rules: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(name)}$": own
        for name, scheme in layers.planned.items()
        if (own := bits_and_group(scheme.weight)) != usual
    }
    rules |= {f"-:^{re.escape(name)}$": {} for name in layers.kept if _IN_BLOCK.search(name)}
    return rules or None


def _note_fallbacks(log: list[dict[str, Any]], config: Any, report: Reporter) -> None:
    """Say for each layer where GPTQ gave up or needed more damping than was asked for."""
    asked = getattr(config, "damp_percent", 0.0)
    for entry in log:
        name = f"layer {entry.get('layer')} {entry.get('module')}"
        loss, damping = str(entry.get("loss", "")), float(entry.get("damp", 0) or 0)
        if "fallback" in loss:
            report.note(f"{name}: rounded to nearest instead of GPTQ ({loss})")
        elif asked and damping > asked + 1e-6:
            report.note(f"{name}: damping raised from {asked} to {damping} to invert the Hessian")
