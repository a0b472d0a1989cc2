"""`load`: a checkpoint directory becomes a model that computes what an engine would serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import open_checkpoint, read_json
from quantkit.errors import InputError
from quantkit.runtime.build import Progress, build_decoder
from quantkit.runtime.decoder import unsupported
from quantkit.runtime.fuse import Fuse
from quantkit.runtime.hosted import build_hosted
from quantkit.runtime.layers import LayerMaker
from quantkit.runtime.model import Runtime
from quantkit.runtime.source import Source, open_source

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@torch.inference_mode()
def load(
    path: Path | str,
    *,
    device: str = "auto",
    kernel: str = "auto",
    fuse: Fuse = "engine",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Runtime:
    """Load a checkpoint of any known layout, or a 16-bit one.

    `kernel` is "auto" or the one kernel that every quantized layer must get; `fuse="none"` leaves
    the scales of fused groups as the file has them; `dtype` is that of the config unless named;
    `progress` gets (decoder layers done, in all). Weights are read one tensor at a time. Raises
    InputError for a checkpoint that is not consistent in itself, and for a kernel that cannot run.
    """
    checkpoint = open_checkpoint(Path(path))
    source = open_source(checkpoint)
    config = read_config(source)
    maker = LayerMaker(
        source,
        pick_device(device),
        _dtype(config, dtype),
        [] if kernel == "auto" else [kernel],
        fuse,
    )
    build = build_hosted if unsupported(config) else build_decoder
    network = build(config, maker, progress)
    _check_all_used(source)
    return Runtime(config, network, maker.records, source.layout, _stop_tokens(source, config))


def read_config(source: Source) -> Any:
    """The Transformers config of a checkpoint, without remote code.

    Raises InputError (`runtime.architecture`) for a model type that Transformers does not know.
    """
    from transformers import AutoConfig

    stated = dict(source.checkpoint.config)
    kind = stated.pop("model_type", None)
    stated.pop("quantization_config", None)
    try:
        return AutoConfig.for_model(kind, **stated)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"Transformers cannot read the config of {source.checkpoint.path}: {error}",
            hint="check model_type in config.json; models that bring their own code are not loaded",
            code="runtime.architecture",
        ) from error


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU where there is one; InputError for a device that is not there."""
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
    return device


def _dtype(config: Any, name: str) -> torch.dtype:
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


def _stop_tokens(source: Source, config: Any) -> list[int]:
    """End-of-text ids of generation_config.json, else of config.json."""
    file = source.checkpoint.path / "generation_config.json"
    stated = read_json(file).get("eos_token_id") if file.is_file() else None
    found = config.eos_token_id if stated is None else stated
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _check_all_used(source: Source) -> None:
    left = [name for name in source.unused() if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise InputError(
            f"{source.checkpoint.path} holds {len(left)} tensors that the model of its config has "
            f"no place for, {left[0]} among them.",
            hint="put the config.json of the model that these weights belong to beside them",
            code="runtime.unused_tensors",
        )
