"""msModelSlim: one quantization step of our own, or one of its practices; writes Ascend's layout.

It runs in an environment of its own with Transformers 4. Its command line is not used: that asks
questions on stdin and tokenizes text itself. The token ids of the job are handed to it instead.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msmodelslim
import yaml
from msmodelslim.core.const import DeviceType
from msmodelslim.core.context import ContextFactory
from msmodelslim.core.practice.interface import PracticeConfig
from msmodelslim.core.quant_service.modelslim_v1.quant_service import (
    ModelslimV1QuantService,
    ModelslimV1QuantServiceConfig,
)
from msmodelslim.ir.norm_bias import RMSNormBias
from msmodelslim.ir.rms_norm import RMSNorm
from msmodelslim.model import PluginModelFactory
from msmodelslim.utils.security.model import SafeGenerator

from quantkit.backends.adapters.common import (
    check_followed,
    folded,
    logs_as_notes,
    modules_by_scheme,
    norms,
    seed_everything,
)
from quantkit.backends.adapters.experts_seen import ExpertsSeen, settled
from quantkit.backends.adapters.seen_tokens import SeenTokens, Tokens
from quantkit.backends.process.job import NO_DATA, Job, JobInputError, Reporter, Result
from quantkit.checkpoint.network.fused_experts import expert_block

_PATH = re.compile(r"[\w/.-]+", re.ASCII)
"""Paths that the library writes to; it refuses any other character."""
_BLOCK = re.compile(r".*?\blayers\.\d+\b")
DESCRIPTION = "quant_model_description.json"
_ACTIVATIONS: dict[str | None, dict[str, Any]] = {
    None: {"scope": "per_tensor", "dtype": "float", "symmetric": True, "method": "none"},
    "tensor": {"scope": "per_tensor", "method": "minmax"},
    "token": {"scope": "per_token", "method": "minmax"},
}
"""Granularity of the input → the library's words."""
_TUNING_ITERS = 400
"""What the library's own practices take for int4 activations, which only its AutoRound step has."""


def run(job: Job, report: Reporter, result: Result) -> None:
    """Quantize `job.model` and save it into `job.out`."""
    seed_everything(job)
    practice = _practice(job)
    tokens = Tokens(job) if job.tokens and _needs_data(practice["spec"]) else None
    if job.tokens and tokens is None:
        report.note("the practice needs no calibration data, and none was used")
        result.calibration = NO_DATA
    witness = SeenTokens(tokens, report)
    with tempfile.TemporaryDirectory() as work, logs_as_notes("msmodelslim", report):
        report.stage("load")
        source = _for_transformers_4(Path(job.model), Path(work))
        SafeGenerator.get_tokenizer_from_pretrained = staticmethod(lambda **_: None)
        adapter = PluginModelFactory().create(
            job.options.get("model_type", "default"), source, job.trust_remote_code
        )
        model = adapter.init_model(_device(job))
        before = norms(model)
        adapter.init_model = lambda **_: model
        for norm in (RMSNorm, RMSNormBias):
            _keep_dtype(norm)
        adapter.handle_dataset = lambda *_: _samples(tokens, job)
        service = ModelslimV1QuantService(
            ModelslimV1QuantServiceConfig(), _NoText(), ContextFactory(enable_debug=False)
        )
        out = Path(job.out) if _PATH.fullmatch(job.out) else Path(work, "out")
        config = PracticeConfig.model_validate(practice).extract_quant_config()
        blocks = {block: block for name in job.layers if (block := expert_block(name))}
        experts = ExpertsSeen(model, blocks, tokens, 1, once=True)
        with witness.watch(model, "quantize"), experts.watch(feed=False):
            service.quantize(config, adapter, out, _device(job))
        if out != Path(job.out):
            shutil.copytree(out, job.out, dirs_exist_ok=True)
        result.folds = folded(before, norms(model))
    quantized = _quantized(Path(job.out))
    check_followed(job, quantized)
    if tokens is not None:
        result.calibration = witness.summary(len(quantized))
        result.experts = settled(job, experts.summary())


def _keep_dtype(norm: Any) -> None:
    """Make a norm that smoothing puts in answer in the model's dtype: it gives float32 of a model
    in 16 bit, which the next layer refuses."""
    forward = norm.forward
    norm.forward = lambda self, hidden: forward(self, hidden).to(hidden.dtype)


class _NoText:
    """Stands where the library loads texts by name: the ids come from `handle_dataset`."""

    def get_dataset_by_name(self, _: str) -> list[Any]:
        return []


def _samples(tokens: Tokens | None, job: Job) -> list[list[Any]]:
    """The library's form of a data set: ids and mask of one sample after the other."""
    batches = tokens.batches(1) if tokens else []
    device = _device(job).value
    return [[b["input_ids"].to(device), b["attention_mask"].to(device)] for b in batches]


def _device(job: Job) -> DeviceType:
    return DeviceType(job.device.partition(":")[0])


def _practice(job: Job) -> dict[str, Any]:
    """The library's configuration: the recipe's, or the practice it names, saved our way."""
    named = job.options.get("practice")
    practice: dict[str, Any] = {
        "apiversion": "modelslim_v1",
        "spec": {"runner": "model_wise", "process": list(_steps(job))},
    }
    if named:
        practice = _named_practice(named)
    size = max(1, round(job.shard_size / 1e9))
    practice["spec"]["save"] = [{"type": "ascendv1_saver", "part_file_size": size}]
    return practice


def _needs_data(spec: dict[str, Any]) -> bool:
    """Whether a step looks at activations: all do but rounding, where the input has no static
    scale."""
    stages = [spec, *(spec.get("prior") or [])]
    steps = [step for stage in stages for step in stage.get("process") or []]
    inputs = [(step.get("qconfig") or {}).get("act") or {"dtype": "float"} for step in steps]
    return any(
        step.get("type") != "linear_quant"
        or not (given.get("dtype") == "float" or given.get("scope") == "per_token")
        for step, given in zip(steps, inputs, strict=True)
    )


def _steps(job: Job) -> Iterator[dict[str, Any]]:
    """One step for each scheme of the plan, with the exact names of its modules."""
    for scheme, names in modules_by_scheme(job.layers).items():
        given = scheme.input
        activation = dict(_ACTIVATIONS[given.granularity if given else None])
        if given:
            activation |= {"dtype": given.element, "symmetric": given.symmetric}
        weight = {
            "scope": "per_channel", "dtype": scheme.weight.element, "symmetric": True,
            "method": "minmax",
        }  # fmt: skip
        layers = {"qconfig": {"act": activation, "weight": weight}, "include": names, "exclude": []}
        if activation["dtype"] == "int4":
            _check_blocks(job)
            weight["method"] = "autoround"
            iters = job.options.get("iters", _TUNING_ITERS)
            yield {"type": "autoround_quant", "iters": iters, "strategies": [layers]}
        else:
            yield {"type": "linear_quant", **layers}


def _check_blocks(job: Job) -> None:
    """Refuse what the tuning step would stop at: a decoder block without a layer to tune."""
    tuned = {found.group() for name in job.layers if (found := _BLOCK.match(name))}
    others = {found.group() for name in job.keep if (found := _BLOCK.match(name))} - tuned
    if others:
        raise JobInputError(
            f"msModelSlim tunes every decoder block, and {len(others)} have no layer to quantize: "
            f"{', '.join(sorted(others)[:3])}.",
            hint="name a layer of every block in the recipe's targets",
            code="msmodelslim.empty_block",
        )


def _named_practice(name: str) -> dict[str, Any]:
    """A practice by file, or by its path in the library's lab_practice without the ending."""
    shipped = Path(msmodelslim.__file__).parent / "lab_practice"
    for file in (Path(name), shipped / f"{name}.yaml"):
        if file.is_file():
            return _read_practice(file)
    known = sorted(str(f.relative_to(shipped).with_suffix("")) for f in shipped.rglob("*.yaml"))
    raise JobInputError(
        f"msModelSlim has no practice {name!r}; it has {len(known)}, for example {known[0]}.",
        hint=f"name one of the files under {shipped}, without .yaml",
        code="msmodelslim.no_practice",
    )


def _read_practice(file: Path) -> dict[str, Any]:
    try:
        practice = yaml.safe_load(file.read_text(encoding="utf-8"))
        version, spec = practice["apiversion"], practice["spec"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        why = f"it cannot be read as one ({type(error).__name__}: {error})"
    else:
        if version == "modelslim_v1" and isinstance(spec, dict):
            return dict(practice)
        why = f"its apiversion is {version!r}, and only modelslim_v1 runs here"
    raise JobInputError(
        f"{file} is no practice for this backend: {' '.join(why.split())}.",
        hint="name a practice with apiversion modelslim_v1 and a spec",
        code="msmodelslim.bad_practice",
    )


def _for_transformers_4(model: Path, work: Path) -> Path:
    """A copy of the source whose config reads right in Transformers 4; the weights are links.

    Transformers 5 keeps the rotary base in `rope_parameters`, which version 4 does not read: it
    would calibrate with its default base and say nothing.
    """
    for file in model.iterdir():
        if file.name.endswith((".safetensors", ".index.json", ".py")):
            (work / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise JobInputError(
            f"{model} has rotary parameters for each kind of layer, which Transformers 4 cannot "
            "express.",
            hint="quantkit methods  # take another backend",
            code="msmodelslim.rope",
        )
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])  # what version 4 calls Qwen's
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    (work / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return work


def _quantized(out: Path) -> set[str]:
    """Modules that the library's description says are quantized."""
    described = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
    return {
        name.removesuffix(".weight")
        for name, kind in described.items()
        if name.endswith(".weight") and kind != "FLOAT"
    }
