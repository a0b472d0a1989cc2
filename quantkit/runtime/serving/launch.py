"""The exact command that serves a checkpoint, derived from its own files.

Sources: SGLang 0.5.23 `configs/model_config.py` (`_verify_quantization`), `arg_groups`, and its
page on quantization; vLLM 0.32 `config/model.py` and `engine/arg_utils.py`. Both read the method
from the checkpoint, so that a flag is only given where SGLang documents one: for ModelOpt. An
online method's name on an offline checkpoint is an error there, or quantizes twice.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from quantkit.checkpoint.custom_code import brought_code
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import gguf_in
from quantkit.checkpoint.network.modules import classify
from quantkit.engines import NAMES, Gpu, Loadable, Verdict, engine_named, judge
from quantkit.engines.check_shapes import check_heads
from quantkit.engines.gpus import gpu_here, platforms
from quantkit.engines.online import FLAG, Online, online_named, refuse_gpu
from quantkit.errors import BackendError, InputError
from quantkit.formats.base import Declaration
from quantkit.formats.loadable import candidate
from quantkit.formats.quantized import examine
from quantkit.formats.registry import detect, is_quantized
from quantkit.runtime.serving.environments import ENGINES, find_interpreter

SERVERS = ("vllm", "sglang")
_MODELOPT_FLAGS = {
    "FP8": "modelopt_fp8",
    "NVFP4": "modelopt_fp4",
    "NVFP4_AWQ": "modelopt_fp4",
    "W4A16_NVFP4": "modelopt_fp4",
}
_PARALLEL = {"vllm": "--tensor-parallel-size", "sglang": "--tp-size"}
"""Engine → flag for the number of GPUs, which its Python interface has as an argument too."""
_OWN_KERNELS = {"fp8_dynamic": "w8a8_fp8", "w8a8_dynamic": "w8a8_int8"}
"""Scheme → SGLang's flag for its own per-channel kernels, which ignores the checkpoint's config."""


@dataclass(frozen=True)
class Launch:
    """A serving command as an argument list, and the flags that it took from the checkpoint.

    minimum_version: the engine's oldest release that is known to read this. environment: variables
    with which it serves better than by default.
    """

    engine: str
    argv: tuple[str, ...]
    minimum_version: str
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    gemm_backend: str | None = None
    """The flag that would choose another GEMM backend than the engine's own choice."""

    notes: tuple[str, ...] = field(default=())
    environment: Mapping[str, str] = field(default_factory=dict)


def launch(path: Path, engine: str, tp: int, gpu: Gpu | None = None, online: str = "") -> Launch:
    """The command for a checkpoint directory: quantkit's or anyone's, also 16-bit or GGUF.

    `gpu` is the one that it is served on, where that is known; `online` is the engine's method that
    quantizes a 16-bit one while it loads. Raises InputError when the engine cannot load it
    (`launch.will_not_load`), for an online method of a quantized checkpoint (`launch.online`), and
    for a directory that is no consistent checkpoint.
    """
    if engine not in SERVERS:
        raise InputError(
            f"There is no server {engine!r}.",
            hint=f"--engine {' or '.join(SERVERS)}",
            code="launch.engine",
        )
    if tp < 1:
        raise InputError(f"--tp {tp} is no number of devices.", hint="--tp 1", code="launch.tp")
    method = online_named(online, engine) if online else None
    if method is not None:
        refuse_gpu(method, gpu)
    file = gguf_in(path) if path.is_dir() else None
    if file is not None:
        _refuse_online(method, "gguf", path)
        return _gguf(file, engine, tp, gpu)
    checkpoint = open_checkpoint(path)
    if is_quantized(checkpoint) is None:
        _refuse_heads(engine, checkpoint, tp)
        return _command(engine, path, tp, method.flags if method else {}, [])
    layout = detect(checkpoint)
    _refuse_online(method, layout.NAME, path)
    subject = examine(checkpoint, layout)
    declared = subject.declaration
    verdict = _refuse(engine, candidate(subject), tp, path, gpu)
    flags = _flags(checkpoint, layout.NAME, declared, engine)
    notes = [f"{verdict.title}: {verdict.unknown}"] if verdict.unknown else []
    notes += verdict.caveats
    if engine == "sglang":
        notes += _sglang_notes(checkpoint, layout.NAME, declared, path, tp)
    made = _command(engine, path, tp, flags, notes)
    made = replace(made, minimum_version=verdict.minimum_version, environment=verdict.environment)
    return replace(made, gemm_backend=_gemm_flag(declared)) if engine == "sglang" else made


def _refuse_online(method: Online | None, layout: str, path: Path) -> None:
    """An engine takes the method from a quantized checkpoint; a second one is an error, or rounds
    what was rounded already."""
    if method is not None:
        raise InputError(
            f"{path} is quantized offline ({layout}), and {NAMES[method.engine]} reads the method "
            f"from it: {FLAG} {method.name} beside it is refused there as another method, or "
            "rounds the weights twice.",
            hint=f"leave --online out, or name the 16-bit model: quantkit launch MODEL --engine "
            f"{method.engine} --online {method.name}",
            code="launch.online",
        )


def flags_of(checkpoint: Checkpoint, engine: str, tp: int = 1) -> dict[str, str | int]:
    """Flag → value that the server needs beyond what it reads from the checkpoint by itself.

    Raises InputError (`launch.will_not_load`) for a declared KV cache that the engine has not, and
    for shapes that do not divide among `tp` GPUs.
    """
    if is_quantized(checkpoint) is None:
        _refuse_heads(engine, checkpoint, tp)
        return {**_parallel(engine, tp)}
    layout = detect(checkpoint)
    subject = examine(checkpoint, layout)
    if tp > 1:
        _refuse(engine, candidate(subject), tp, checkpoint.path, gpu_here())
    flags = _flags(checkpoint, layout.NAME, subject.declaration, engine)
    return {**flags, **_parallel(engine, tp)}


def _parallel(engine: str, tp: int) -> dict[str, int]:
    return {_PARALLEL[engine]: tp} if tp > 1 else {}


def _flags(
    checkpoint: Checkpoint, layout: str, declared: Declaration, engine: str
) -> dict[str, str]:
    flags = {}
    if engine == "sglang" and layout == "modelopt":
        method = _modelopt_flag(checkpoint, declared)
        flags = {"--quantization": method} if method else {}
    if declared.kv_cache != "none":
        flags["--kv-cache-dtype"] = _kv_cache(engine, declared.kv_cache, checkpoint.path)
    return flags


def _command(engine: str, model: Path, tp: int, flags: dict[str, str], notes: list[str]) -> Launch:
    if engine == "vllm":
        argv = ["vllm", "serve", str(model)]
    else:
        argv = ["python3", "-m", "sglang.launch_server", "--model-path", str(model)]
    argv += [str(part) for flag in (flags | _parallel(engine, tp)).items() for part in flag]
    code = brought_code(model) if model.is_dir() else []
    if code:
        argv.append("--trust-remote-code")
        notes = [
            *notes,
            f"the checkpoint brings code ({', '.join(code)}), which --trust-remote-code runs: read "
            "it first",
        ]
    return Launch(
        engine=engine,
        argv=tuple(argv),
        minimum_version=engine_named(engine).minimum_version,
        quantization=flags.get("--quantization"),
        kv_cache_dtype=flags.get("--kv-cache-dtype"),
        notes=tuple(notes),
    )


def _gguf(file: Path, engine: str, tp: int, gpu: Gpu | None) -> Launch:
    _refuse(engine, Loadable({}, "gguf", {}, {}), tp, file, gpu)
    notes = ["the tokenizer is read from the file"] if engine == "sglang" else []
    return _command(engine, file, tp, {}, notes)


def _refuse_heads(engine: str, checkpoint: Checkpoint, tp: int) -> None:
    """Of a 16-bit model: whatever its family, an engine shares its heads out."""
    for reason in check_heads(engine_named(engine), checkpoint.config, tp):
        raise InputError(
            f"{checkpoint.path}: {reason.text}.", hint=reason.fix, code="launch.will_not_load"
        )


def _refuse(engine: str, this: Loadable, tp: int, path: Path, gpu: Gpu | None) -> Verdict:
    verdict = judge(this, (engine,), (tp,), gpu)[0]
    if verdict.refuses:
        reason = verdict.reasons[0]
        raise InputError(
            f"{path}: {verdict.title}: {reason.text}.",
            hint=reason.fix,
            code="launch.will_not_load",
        )
    return verdict


def _modelopt_flag(checkpoint: Checkpoint, declared: Declaration) -> str | None:
    """`modelopt` where config.json states the algorithm; named where only the side file does."""
    algorithms = {spec.packing for spec in declared.layers.values()}
    if checkpoint.quantization_config is None and len(algorithms) == 1:
        return _MODELOPT_FLAGS.get(algorithms.pop())
    return "modelopt" if algorithms <= set(_MODELOPT_FLAGS) else None


def _kv_cache(engine: str, element: str, path: Path) -> str:
    names = {
        "vllm": {"fp8": "fp8", "nvfp4": "nvfp4"},
        "sglang": {"fp8": "fp8_e4m3", "nvfp4": "nvfp4"},
    }[engine]
    if element not in names:
        raise InputError(
            f"{NAMES[engine]} has no KV cache of type {element!r}, which {path} declares.",
            hint="quantize with kv_cache fp8 or none",
            code="launch.will_not_load",
        )
    return names[element]


def _sglang_notes(
    checkpoint: Checkpoint, layout: str, declared: Declaration, path: Path, tp: int
) -> list[str]:
    schemes = {spec.scheme.name for spec in declared.layers.values()}
    notes = []
    if layout == "ascend":
        notes.append("for Ascend NPUs; the method is read from quant_model_description.json")
    flag = _gemm_flag(declared)
    if flag:
        rule = platforms()["sglang_gemm"][flag]
        special = {**rule.get("first", {}), **rule.get("always", {})}
        notes.append(
            f"{flag} is left at auto: the first that runs of {', '.join(rule['auto'])}"
            + "".join(f"; {name} on SM{sm}" for sm, name in special.items())
        )
    own = _OWN_KERNELS.get(next(iter(schemes))) if len(schemes) == 1 else None
    if own and layout == "compressed-tensors" and _all_linear(checkpoint, declared):
        other = _command("sglang", path, tp, {"--quantization": own}, [])
        notes.append(f"SGLang's own kernels instead (optional): {' '.join(other.argv)}")
    return notes


def _gemm_flag(declared: Declaration) -> str | None:
    """SGLang's flag that chooses the GEMM of these weights, where it has one."""
    weights = [spec.scheme.weight for spec in declared.layers.values()]
    if any(weight.granularity == "block" for weight in weights):
        return "--fp8-gemm-backend"
    return "--fp4-gemm-backend" if any(weight.scale == "e4m3" for weight in weights) else None


def _all_linear(checkpoint: Checkpoint, declared: Declaration) -> bool:
    """Whether only the head and the embeddings are kept, as a flag that ignores the config
    assumes."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    kinds = {module.name: module.kind for module in classify(shapes, checkpoint.config)}
    kept = (*declared.ignored, *declared.undeclared)
    return all(kinds.get(name) in ("head", "embedding") for name in kept)


def executable(made: Launch) -> str:
    """The full path of the command's program: of the managed environment, else the user's own.

    Raises BackendError, with the command that makes the environment, when the engine is in neither.
    """
    name = made.argv[0]
    module = name.startswith("python")
    try:
        python = find_interpreter(ENGINES[made.engine])
    except BackendError:
        here = sys.executable if find_spec(made.engine) else None
        found = here if module else shutil.which(name)
        if found is None:
            raise
        return found
    return str(python if module else python.with_name(name))
