"""NVIDIA ModelOpt: calibrate and fake-quantize, save the state, export a unified checkpoint."""

from __future__ import annotations

import inspect
import random
import re
import warnings
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantkit.backends.modelopt_config import (
    check_calibrated,
    check_quantized,
    never_ran,
    quant_config,
)
from quantkit.backends.modelopt_state import restore_state, save_state
from quantkit.job import Job, JobError, Reporter, Result, token_digest

_TELLING = re.compile(
    r"skip|calibrat|fall(s|ing)? ?back|fallback|disabl|unsupported|not support|pad|ignor|clip",
    re.IGNORECASE,
)
"""Words of warnings that say that something was not done as asked."""


def run(job: Job, report: Reporter, result: Result) -> None:
    """Quantize `job.model`, or restore `job.restore` on it, and export it into `job.out`."""
    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)
    with _warnings_as_notes(report, frozenset(job.keep)):
        report.stage("load")
        model = _load(job)
        if job.task == "export":
            report.stage("restore")
            model = restore_state(model, job)
            if job.layers:
                check_quantized(job, model)
        else:
            _quantize(model, job, report, result)
            if job.checkpoint_save:
                report.stage("save state")
                save_state(model, job, result)
        report.stage("export")
        norms = {name: norm.weight.clone() for name, norm in _norms(model)}
        export_hf_checkpoint(model, export_dir=job.out, max_shard_size=job.shard_size)
        folded = [name for name, norm in _norms(model) if not norm.weight.equal(norms[name])]
        result.folds = {"norm": folded} if folded else {}


def _load(job: Job) -> torch.nn.Module:
    """The model in the dtype of its checkpoint, on the job's device."""
    placement = {} if job.device == "cpu" else {"device_map": {"": job.device}}
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype="auto",
        local_files_only=True,
        trust_remote_code=job.trust_remote_code,
        **placement,
    )
    return model.eval()


def _quantize(model: torch.nn.Module, job: Job, report: Reporter, result: Result) -> None:
    config = quant_config(job, model)
    if job.tokens is None:
        report.stage("quantize")
        mtq.quantize(model, config)
        check_quantized(job, model)
        check_calibrated(config, model)
        return
    calibration = Calibration(job, report)
    mtq.quantize(model, config, calibration.run)
    check_quantized(job, model)
    result.calibration = calibration.summary(check_calibrated(config, model))


class Calibration:
    """The forward passes over the job's tokens, and a witness of what reached the model."""

    def __init__(self, job: Job, report: Reporter) -> None:
        assert job.tokens is not None
        tokens = load_file(job.tokens)
        self.ids, self.masks = tokens["input_ids"], tokens["attention_mask"]
        self.report = report
        self.batch_size = job.batch_size
        self.device = job.device
        self.needs_logits = any(name.rpartition(".")[2] == "lm_head" for name in job.layers)
        self.passes: list[list[array[int]]] = []
        self.mask = self.masks

    def run(self, model: Any) -> None:
        """One pass over all samples; some algorithms ask for several."""
        known = inspect.signature(model.forward).parameters
        options = {"use_cache": False, "logits_to_keep": 0 if self.needs_logits else 1}
        options = {name: value for name, value in options.items() if name in known}
        batches = range(0, len(self.ids), self.batch_size)
        self.passes.append([])
        number = len(self.passes)
        self.report.stage("calibrate" if number == 1 else f"calibrate {number}", len(batches))
        embedding = model.get_input_embeddings()
        witness = embedding.register_forward_pre_hook(self._witness)
        try:
            with torch.no_grad():
                for done, start in enumerate(batches, 1):
                    rows = slice(start, start + self.batch_size)
                    self.mask = self.masks[rows]
                    model(
                        input_ids=self.ids[rows].to(self.device),
                        attention_mask=self.mask.to(self.device),
                        **options,
                    )
                    self.report.advance(done)
        finally:
            witness.remove()

    def _witness(self, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        for ids, mask in zip(arguments[0].cpu(), self.mask, strict=True):
            self.passes[-1].append(array("q", ids[mask.bool()].tolist()))

    def summary(self, modules: int) -> dict[str, Any]:
        """`Result.calibration`; JobError when no or not the same tokens arrived in each pass."""
        if not self.passes or not any(self.passes[0]):
            raise never_ran("No calibration token reached the model")
        digests = {token_digest(samples) for samples in self.passes}
        if len(digests) != 1:
            raise JobError(
                f"The {len(self.passes)} calibration passes saw different tokens.",
                hint="run it again; if it happens twice, report it with the log",
                code="calibration.unstable",
            )
        first = self.passes[0]
        return {
            "samples": len(first),
            "tokens": sum(len(sample) for sample in first),
            "digest": digests.pop(),
            "passes": len(self.passes),
            "modules": modules,
        }


def _norms(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules whose weight is a vector: the ones that a method may fold scales into."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.ndim == 1:
            yield name, module


@contextmanager
def _warnings_as_notes(report: Reporter, keep: frozenset[str]) -> Iterator[None]:
    """Pass on those library warnings that tell of something left out; all go to the log too.

    One that names a module of `keep` says what was asked for.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def showwarning(message: Warning | str, *rest: Any) -> None:
            show(message, *rest)
            words = str(message).split()
            if _TELLING.search(str(message)) and keep.isdisjoint(words):
                report.note(" ".join(words))

        warnings.showwarning = showwarning  # type: ignore[assignment]
        yield
