"""ModelOpt's AutoQuantize as a scorer: what each format would do to each group of layers.

Its gradient method sums (gradient × change of the output)² over all elements of a group's outputs
under the loss of the text itself (`algorithms.AutoQuantizeGradientSearcher`). What it would choose
is not used.
"""

from __future__ import annotations

import json
from typing import Any

import modelopt.torch.quantization as mtq

from quantkit.backends.adapters.common import seed_everything, warnings_as_notes
from quantkit.backends.adapters.group_scores import Asked, unknown_format
from quantkit.backends.adapters.placed import load_placed
from quantkit.backends.adapters.seen_tokens import Tokens
from quantkit.backends.process.job import Job, JobInputError, Reporter, Result
from quantkit.checkpoint.schemes import NumberFormat, Scheme

_FLOATS = {"fp8_e4m3": (4, 3), "fp4_e2m1": (2, 1)}
_SCALES = {"e4m3": (4, 3), "e8m0": (8, 0)}


def run(job: Job, report: Reporter, result: Result) -> None:  # noqa: ARG001
    """Write the scores of `group_scores` into `job.out`."""
    seed_everything(job)
    with warnings_as_notes(report):
        report.stage("load")
        model = load_placed(job)
        asked = Asked.of(job, model)
        titles: dict[str, list[str]] = {}
        for title, scheme in asked.schemes.items():
            _check_device(job, scheme)
            titles.setdefault(json.dumps(_config(scheme)), []).append(title)
        formats = [_with_bits(asked.schemes[same[0]]) for same in titles.values()]
        batches = Tokens(job).batches(job.batch_size)
        report.stage("score")
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": 16.0},
            quantization_formats=formats,
            data_loader=batches,
            forward_step=_forward,
            loss_func=lambda output, _batch: output.loss,
            disabled_layers=asked.others(model),
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            verbose=False,
        )
        found: dict[str, dict[str, float]] = {}
        for number, same in enumerate(titles.values()):
            name = mtq.algorithms.QuantRecipe.get_auto_name_for_config(formats[number])
            scores = asked.summed(_scores(state, name or f"CUSTOM_{number}"))
            found |= dict.fromkeys(same, scores)
        asked.write(job, found)


def _forward(model: Any, batch: dict[str, Any]) -> Any:
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return model(**moved, labels=moved["input_ids"], use_cache=False)


def _scores(state: Any, name: str) -> list[tuple[list[str], float]]:
    """The modules of every group of the library, and its score in the format of that name."""
    found = []
    for stats in state["candidate_stats"].values():
        for recipe, score in zip(stats["formats"], stats["scores"], strict=True):
            if str(recipe).startswith(f"{name}("):
                found.append((list(stats["module_names"]), float(score)))
    return found


def _config(scheme: Scheme) -> dict[str, Any]:
    """The config that quantizes every layer that it is tried on so."""
    weight = {"quantizer_name": "*weight_quantizer", "cfg": _format(scheme, scheme.weight)}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}, weight]
    if scheme.input is not None:
        entries.append({"quantizer_name": "*input_quantizer", "cfg": _format(scheme, scheme.input)})
    return {"quant_cfg": entries, "algorithm": "max"}


def _with_bits(scheme: Scheme) -> dict[str, Any]:
    """As `_config`, with the stored bits a weight of a large layer: the library takes no format's
    score for more than that of one with fewer bits."""
    return {**_config(scheme), "effective_bits": scheme.weight.bits_per_weight((1 << 16, 1 << 16))}


def _format(scheme: Scheme, number: NumberFormat) -> dict[str, Any]:
    if not number.symmetric:
        raise unknown_format("ModelOpt", scheme)
    bits = number.bits if number.is_int else _FLOATS.get(number.element)
    if bits is None:
        raise unknown_format("ModelOpt", scheme)
    found: dict[str, Any] = {"num_bits": bits}
    if number.scale in _SCALES:
        blocks = {-1: number.group_size, "type": "dynamic", "scale_bits": _SCALES[number.scale]}
        return {**found, "block_sizes": blocks}
    if number.granularity == "token":
        return {**found, "type": "dynamic", "block_sizes": {-1: None}}
    if number.granularity == "group":
        dynamic = {"type": "dynamic"} if number.dynamic else {}
        return {**found, "block_sizes": {-1: number.group_size, **dynamic}}
    if number.granularity == "block":
        assert number.block
        return {**found, "block_sizes": {-1: number.block[1], -2: number.block[0]}}
    return {**found, "axis": 0 if number.granularity == "channel" else None}


def _check_device(job: Job, scheme: Scheme) -> None:
    """The library's FP4 kernels exist on CUDA alone."""
    if job.device == "cpu" and scheme.weight.element == "fp4_e2m1":
        raise JobInputError(
            f"ModelOpt cannot score {scheme.name} on a CPU.",
            hint="--set schemes=[w4a16,fp8_dynamic], --device cuda, or leave options.scorer out",
            code="modelopt.needs_cuda",
        )
