"""NVIDIA ModelOpt: calibrate and fake-quantize, save the state, export a unified checkpoint.

Which of its configurations a scheme takes: `modelopt_config.PRESETS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint

from quantkit.backends.adapters.common import (
    check_followed,
    folded,
    norms,
    seed_everything,
    warnings_as_notes,
)
from quantkit.backends.adapters.experts_seen import ExpertsSeen, settled
from quantkit.backends.adapters.kept_lists import complete_lists
from quantkit.backends.adapters.modelopt_config import (
    check_calibrated,
    keep_blocks,
    leave_fused,
    planned_names,
    quant_config,
    quantized_layers,
)
from quantkit.backends.adapters.modelopt_resume import forget, prepare
from quantkit.backends.adapters.modelopt_state import restore_state, save_state
from quantkit.backends.adapters.modelopt_whole import leave_whole
from quantkit.backends.adapters.placed import load_placed, offload_removed
from quantkit.backends.adapters.places import (
    Place,
    expert_blocks,
    kept_layers,
    locate,
    places,
    renamed_modules,
)
from quantkit.backends.adapters.seen_tokens import SeenTokens, Tokens
from quantkit.backends.process.job import Job, Reporter, Result


def run(job: Job, report: Reporter, result: Result) -> None:
    """Quantize `job.model`, or restore `job.restore` on it, and export it into `job.out`."""
    seed_everything(job)
    with warnings_as_notes(report, frozenset(job.keep)), offload_removed(job):
        report.stage("load")
        if job.resume_folder:
            prepare(job)
        model = load_placed(job)
        if job.task == "export":
            report.stage("restore")
            found = places(model, job.layers)
            if job.layers:
                leave_whole(model, found)
            model = restore_state(model, job)
            if job.layers:
                check_followed(job, set(quantized_layers(model)), planned_names(model, found))
        else:
            _quantize(model, job, report, result)
            if job.checkpoint_save:
                report.stage("save state")
                save_state(model, job, result)
        report.stage("export")
        kept = kept_layers(model, job)
        leave_fused(model, kept.values())
        before = norms(model)
        export_hf_checkpoint(model, export_dir=job.out, max_shard_size=job.shard_size)
        complete_lists(Path(job.out), [*kept, *result.kept], renamed_modules(kept))
        result.folds = folded(before, norms(model))


def _quantize(model: torch.nn.Module, job: Job, report: Reporter, result: Result) -> None:
    found = locate(model, job)
    config = quant_config(job, model, found)
    leave_whole(model, found)
    calibration = Calibration(job, report, model, found) if job.tokens else None
    report.stage("quantize")
    mtq.quantize(model, config, calibration.run if calibration else None)
    check_followed(job, set(quantized_layers(model)), planned_names(model, found))
    calibrated = check_calibrated(config, model)
    if calibration is not None:
        result.calibration = calibration.witness.summary(calibrated)
        result.experts = settled(job, calibration.experts.summary())
        if job.on_unseen == "keep16":
            kept = {name.rpartition(".")[0] for name in result.experts.get("under_floor", ())}
            result.kept = keep_blocks(model, found, kept)


class Calibration:
    """Forward passes over the job's tokens, watched by a witness."""

    def __init__(
        self, job: Job, report: Reporter, model: torch.nn.Module, found: Mapping[str, Place]
    ) -> None:
        self.job = job
        self.tokens = Tokens(job)
        self.experts = ExpertsSeen(model, expert_blocks(found), self.tokens, job.batch_size)
        self.feed = job.experts == "all"
        self.witness = SeenTokens(self.tokens, report)
        self.report = report
        self.batch_size = job.batch_size
        self.device = job.device
        self.needs_logits = any(name.rpartition(".")[2] == "lm_head" for name in job.layers)
        self.passes = 0
        known = inspect.signature(model.forward).parameters
        options = {"use_cache": False, "logits_to_keep": 0 if self.needs_logits else 1}
        self.options = {name: value for name, value in options.items() if name in known}

    def run(self, model: Any) -> None:
        """One pass over all samples; some algorithms ask for several."""
        batches = self.tokens.batches(self.batch_size)
        self.passes += 1
        if self.job.resume_folder:
            forget(self.job)
        name = "calibrate" if self.passes == 1 else f"calibrate, pass {self.passes}"
        self.report.stage(name, len(batches))
        hook = model.get_input_embeddings().register_forward_pre_hook(self.witness.embedded)
        try:
            with torch.no_grad(), self.experts.watch(feed=self.feed):
                for done, batch in enumerate(batches, 1):
                    moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
                    model(**moved, **self.options)
                    self.report.advance(done)
        finally:
            hook.remove()
