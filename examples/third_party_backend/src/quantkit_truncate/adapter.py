"""The worker's side: reads the job, writes a Hugging Face checkpoint. quantkit does the rest.

It quantizes each row of a weight to INT8, in the layout "int-quantized" of compressed-tensors. A
real backend would call its library here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.backends.process.job import Job, JobError, Reporter, Result

LEVELS = 127


def run(job: Job, report: Reporter, result: Result) -> None:
    """Quantize the layers of `job.layers` into `job.out`."""
    report.stage("quantize", len(job.layers))
    tensors = {}
    for shard in sorted(Path(job.model).glob("*.safetensors")):
        tensors |= load_file(shard)
    clip = float(job.options.get("clip", 1.0))
    for done, name in enumerate(sorted(job.layers), 1):
        weight = tensors.pop(f"{name}.weight", None)
        if weight is None:
            raise JobError(
                f"{name} has no weight in {job.model}.",
                hint="put it on the recipe's ignore list",
                code="truncate.missing",
            )
        scale = (weight.float().abs().amax(1, keepdim=True) * clip / LEVELS).to(weight.dtype)
        scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
        codes = (weight.float() / scale.float()).round().clamp(-LEVELS - 1, LEVELS)
        clipped = int((codes.abs() > LEVELS).sum())
        if clipped:
            report.note(f"{name}: {clipped} weights clipped")
        tensors[f"{name}.weight"] = codes.to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale
        report.advance(done)
    report.stage("save")
    out = Path(job.out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(Path(job.model, "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _declaration(job)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    result.versions["quantkit-truncate"] = "0.1.0"


def _declaration(job: Job) -> dict[str, object]:
    weights = {
        "num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "format": "int-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [name for name in job.keep if not name.endswith("embed_tokens")],
    }
