"""AutoRound's AutoScheme as a scorer: its delta loss of every layer and scheme.

That is |gradient × change|, summed over the weights of a layer and over its inputs where those are
rounded too, under the loss of the text itself (`auto_scheme.delta_loss`). What it would choose is
not used, as its mixed results load in no engine.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from auto_round.auto_scheme import delta_loss
from auto_round.auto_scheme.utils import apply_quant_scheme, remove_quant_scheme
from auto_round.schemes import QuantizationScheme

from quantkit.backends.adapters.common import (
    bits_and_group,
    logs_as_notes,
    seed_everything,
    warnings_as_notes,
)
from quantkit.backends.adapters.group_scores import Asked, unknown_format
from quantkit.backends.adapters.placed import load_placed
from quantkit.backends.adapters.seen_tokens import Tokens
from quantkit.backends.process.job import Job, JobInputError, Reporter, Result
from quantkit.checkpoint.schemes import NumberFormat, Scheme


def run(job: Job, report: Reporter, result: Result) -> None:  # noqa: ARG001
    """Write the scores of `group_scores` into `job.out`."""
    seed_everything(job)
    with warnings_as_notes(report), logs_as_notes("autoround", report):
        report.stage("load")
        model = load_placed(job)
        asked = Asked.of(job, model)
        layers = [module for modules in asked.modules.values() for module in modules]
        _refuse_fused(job, model, layers)
        tokens = Tokens(job)
        delta_loss.get_dataloader = lambda *_, **__: tokens.batches(job.batch_size)
        model.enable_input_require_grads()  # else nothing leads back to its wrappers (0.15.1)
        for name in layers:
            model.get_submodule(name).tmp_name = name
        found = {}
        report.stage("score", len(asked.schemes))
        for done, (title, scheme) in enumerate(asked.schemes.items(), 1):
            settings = asdict(QuantizationScheme.from_dict(_settings(scheme)))
            apply_quant_scheme(model, layers, {}, settings)
            scores = delta_loss.get_score_for_scheme(
                model, None, layers, {}, "the job's tokens", need_weight_grad=True,
                enable_torch_compile=False, low_gpu_mem_usage=False, batch_size=job.batch_size,
                major_device=job.device, nsamples=len(tokens), seqlen=tokens.ids.shape[1],
            )  # fmt: skip
            remove_quant_scheme(model)
            found[title] = asked.summed(([name], loss) for name, (_, loss) in scores.items())
            report.advance(done)
        asked.write(job, found)


def _settings(scheme: Scheme) -> dict[str, Any]:
    """The scheme in the library's words."""
    weight, given = scheme.weight, scheme.input
    found = {**bits_and_group(weight), "data_type": _kind(scheme, weight), "act_bits": 16}
    if weight.block:
        found["group_size"] = weight.block
    if weight.granularity == "tensor":
        found["group_size"] = 0
    if given is not None:
        kind = _kind(scheme, given)
        found |= {
            "act_bits": given.bits,
            "act_group_size": 0 if given.granularity == "tensor" else given.group_size or -1,
            "act_data_type": "nv_fp4_with_static_gs" if kind == "nv_fp" else kind,
            "act_dynamic": True,
            "act_sym": True,
        }
    return found


def _kind(scheme: Scheme, number: NumberFormat) -> str:
    if number.is_int:
        return "int"
    if number.scale == "e8m0":
        return "mx_fp"
    if number.scale == "e4m3":
        return "nv_fp"
    if number.element == "fp8_e4m3":
        return "fp"
    raise unknown_format("AutoRound", scheme)


def _refuse_fused(job: Job, model: Any, layers: list[str]) -> None:
    """Experts that Transformers holds in 3-D tensors have no layers to wrap."""
    if any(not hasattr(model.get_submodule(name), "weight") for name in layers):
        raise JobInputError(
            f"AutoRound's scores of {job.model} would leave its experts out.",
            hint="options.scorer=modelopt, or leave it out",
            code="search.no_score",
        )
