"""`load`: a checkpoint directory becomes a model that computes what an engine would serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit.backends.adapters.hf_config import stated_value
from quantkit.backends.environments.device import resolve_devices
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.gguf import gguf_in
from quantkit.checkpoint.lean_transformers import without_docstrings
from quantkit.checkpoint.network.config import stop_tokens
from quantkit.checkpoint.progress import Progress
from quantkit.engines.online import Online
from quantkit.errors import InputError
from quantkit.runtime.linear.kernels import dequantized
from quantkit.runtime.loading.as_served import gpu_to_serve
from quantkit.runtime.loading.build import build_decoder
from quantkit.runtime.loading.fuse import Fuse
from quantkit.runtime.loading.gguf import open_gguf_source
from quantkit.runtime.loading.hosted import HostedNetwork, build_hosted
from quantkit.runtime.loading.make_layers import LayerMaker, LayerRecord
from quantkit.runtime.loading.memory import keep
from quantkit.runtime.loading.online import OnlineLayers
from quantkit.runtime.loading.rounded import kernels_of, open_rounded
from quantkit.runtime.loading.source import CheckpointReader, open_source
from quantkit.runtime.model import Runtime
from quantkit.runtime.network.decoder import Decoder, unsupported
from quantkit.runtime.network.devices import enter

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@torch.inference_mode()
def load(
    path: Path | str,
    *,
    device: str = "auto",
    kernel: str = "auto",
    fuse: Fuse = "engine",
    dtype: str = "auto",
    as_on: str = "",
    online: Online | None = None,
    progress: Progress | None = None,
) -> Runtime:
    """Load a checkpoint of any known layout, a GGUF file's directory, or a 16-bit one.

    `kernel` is "auto" or the one kernel that every quantized layer must get; `fuse="none"` leaves
    the scales of fused groups as the file has them; `dtype` is that of the config unless named;
    `device` may name several GPUs (cuda:0,1), each of which gets an equal part of the layers;
    `as_on` is the GPU (h100, b200, …) as whose engine activations are rounded, or left in 16 bit
    (default: this one; on a CPU as declared); `online` rounds the layers of a 16-bit checkpoint as
    they are read, as that method of an engine does; `progress` gets (decoder layers done, in all).
    Weights are read one tensor at a time. Raises InputError for a checkpoint that is not consistent
    in itself, and for a kernel that cannot run.
    """
    source = open_path(Path(path))
    check_kernel(source, kernel)
    layers = None if online is None else rounded_layers(source, online)
    kernels = [] if kernel == "auto" else [kernel]
    return _filled(source, kernels, device, fuse, dtype, as_on, layers, progress)


@torch.inference_mode()
def load_rounded(
    path: Path,
    like: Path,
    *,
    device: str = "auto",
    kernel: str = "auto",
    as_on: str = "",
    progress: Progress | None = None,
) -> Runtime:
    """Load the 16-bit model of `path` with the layers of the checkpoint `like` rounded to nearest.

    Arguments are those of `load`; layers that have static activation scales there are computed by
    the kernel `reference`, which does without. Raises InputError as `load` does, and for a layer
    that the model does not have (`runtime.rounded`).
    """
    source = open_rounded(open_checkpoint(path), open_path(like))
    kernels = kernels_of(source.layers) if kernel == "auto" else [kernel]
    return _filled(source, kernels, device, "engine", "auto", as_on, None, progress)


def _filled(
    source: CheckpointReader,
    kernels: Sequence[str],
    device: str,
    fuse: Fuse,
    dtype: str,
    as_on: str,
    online: OnlineLayers | None,
    progress: Progress | None,
) -> Runtime:
    config = read_config(source)
    places = pick_devices(device)
    gpu = gpu_to_serve(as_on, places[0])
    maker = LayerMaker(source, places[0], pick_dtype(config, dtype), kernels, fuse, gpu, online)
    if other := unsupported(config):
        check_one_device(places, other)
        network: Decoder | HostedNetwork = build_hosted(config, maker, progress)
    else:
        network = build_decoder(config, maker, progress, places)
    _check_all_used(source)
    if maker.device.type == "cpu":
        keep()
    records = maker.records + expanded_records(source)
    stop = stop_tokens(
        source.checkpoint.path, {"eos_token_id": stated_value(config, "eos_token_id")}
    )
    return Runtime(config, network, records, source.layout, stop)


def open_path(path: Path) -> CheckpointReader:
    """A directory of safetensors with its config.json, or one with a GGUF file.

    Raises InputError for what cannot be understood or contradicts itself; reads no weights.
    """
    return open_gguf_source(path) if gguf_in(path) else open_source(open_checkpoint(path))


def rounded_layers(source: CheckpointReader, online: Online) -> OnlineLayers:
    """The layers that an online method rounds; InputError (`online.offline`) where the checkpoint
    is quantized already."""
    if source.layout is not None:
        raise InputError(
            f"{source.checkpoint.path} is quantized already ({source.layout}); {online.name} "
            "rounds 16-bit checkpoints while they load.",
            hint="name the 16-bit model",
            code="online.offline",
        )
    return OnlineLayers.of(source.checkpoint, online)


def expanded_records(source: CheckpointReader) -> list[LayerRecord]:
    """How the modules of a layout are computed whose weights are dequantized as they are read."""
    return [
        LayerRecord(module, kind, dequantized.NAME, {}, weights_only=False)
        for module, kind in source.expanded.items()
    ]


def check_kernel(source: CheckpointReader, kernel: str) -> None:
    """InputError (`kernel.refused`) for a kernel that a layout without codes does not have."""
    if source.expanded and kernel not in ("auto", dequantized.NAME):
        raise InputError(
            f"{source.checkpoint.path} is a {source.layout} file, whose weights are computed "
            f"dequantized; the kernel {kernel} does not read them.",
            hint=f"--kernel auto or {dequantized.NAME}",
            code="kernel.refused",
        )


def read_config(source: CheckpointReader) -> Any:
    """The Transformers config of a checkpoint, without remote code.

    Raises InputError (`runtime.architecture`) for a model type that Transformers does not know, and
    for values that no network has.
    """
    from transformers import AutoConfig

    values = _with_floats(source.checkpoint.config)
    kind = values.pop("model_type", None)
    values.pop("quantization_config", None)
    try:
        with without_docstrings():
            config = AutoConfig.for_model(kind, **values)
    except Exception as error:  # each family checks its values in its own way
        raise _unreadable(source, " ".join(str(error).split()) or type(error).__name__) from error
    heads = getattr(config, "num_attention_heads", 1)
    if not isinstance(heads, int) or heads < 1:
        raise _unreadable(source, f"num_attention_heads is {heads!r}")
    return config


def _with_floats(value: Any) -> Any:
    """A config as Transformers writes it, `{"__float__": "Infinity"}` being the number."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(inner) for key, inner in value.items()}
    return [_with_floats(inner) for inner in value] if isinstance(value, list) else value


def _unreadable(source: CheckpointReader, why: str) -> InputError:
    return InputError(
        f"Transformers cannot read the config of {source.checkpoint.path}: {why}",
        hint="check model_type and the values of config.json; models that bring their own code are "
        "not loaded",
        code="runtime.architecture",
    )


def pick_devices(name: str) -> list[torch.device]:
    """The devices that `--device` names, `cuda:0,1` being two; the first is the current one.
    Raises what `pick_device` raises."""
    found = [pick_device(one) for one in (resolve_devices(name) if "," in name else (name,))]
    enter(found[0])
    return found


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU where there is one; InputError for a device that is not there.

    A GPU named by its number becomes the current one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"The device {name!r} cannot be used here: {str(error).splitlines()[0]}",
            hint="--device auto, cpu or cuda:N",
            code="runtime.device",
        ) from error
    enter(device)
    return device


def check_one_device(devices: Sequence[torch.device], why: str) -> None:
    """InputError (`runtime.devices`) for several, where Transformers' modules compute because of
    `why`."""
    if len(devices) > 1:
        named = ", ".join(str(device) for device in devices)
        raise InputError(
            f"The built-in runtime computes this network on one device, not on {named}: {why}.",
            hint="one device, or validate with --engine vllm, sglang or transformers, which divide "
            "a model over GPUs",
            code="runtime.devices",
        )


def pick_dtype(config: Any, name: str) -> torch.dtype:
    """The dtype to compute in: that of the config for "auto"; InputError for an unknown name."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(
                f"There is no dtype {name!r} to compute in.",
                hint=f"choose auto, {', '.join(DTYPES)}",
                code="runtime.dtype",
            )
        return DTYPES[name]
    stated = config.dtype
    if isinstance(stated, str):
        stated = DTYPES.get(stated)
    return stated if stated in DTYPES.values() else torch.bfloat16


def _check_all_used(source: CheckpointReader) -> None:
    left = [name for name in source.unused() if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise InputError(
            f"{source.checkpoint.path} holds {len(left)} tensors that the model of its config has "
            f"no place for, {left[0]} among them.",
            hint="put the config.json of the model that these weights belong to beside them",
            code="runtime.unused_tensors",
        )
