"""Where the weights of a model lie while a library works, in the words of accelerate.

*resident*: all on the job's device. *layerwise*: each decoder block stays in the checkpoint's own
safetensors and comes to the device when it runs; what lies outside of the blocks is on the device.
*spread*: over all devices of the job in order, host memory last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from quantkit.backends.adapters.hf_config import auto_class
from quantkit.backends.process.job import Job, JobInputError

FREE_SHARE = 0.8
"""What `spread` takes of a device's free memory; activations and statistics get the rest."""
_FOLDER = "offload"
_HOST = torch.iinfo(torch.int64).max
"""Bytes of host memory that accelerate may plan with: what is there was looked at before."""


def load_placed(job: Job) -> Any:
    """The model in the dtype of its checkpoint, placed as the job says.

    Weights that a library changes while they are offloaded are written below `job.out`;
    `offload_removed` takes that folder away.
    """
    kind = auto_class(_config(job))
    model: torch.nn.Module = kind.from_pretrained(
        job.model,
        dtype="auto",
        local_files_only=True,
        trust_remote_code=job.trust_remote_code,
        **_asked(job),
    )
    return model.eval()


@contextmanager
def offload_removed(job: Job) -> Iterator[None]:
    """Take the folder of changed weights away at the end, also after a failure."""
    try:
        yield
    finally:
        shutil.rmtree(_folder(job), ignore_errors=True)


def empty_model(job: Job) -> torch.nn.Module:
    """The model without weights (on the meta device), its tied weights tied."""
    config = _config(job)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=job.trust_remote_code)
    model.tie_weights()
    evaluated: torch.nn.Module = model.eval()
    return evaluated


def decoder_blocks(model: Any) -> list[str]:
    """Names of the modules that Transformers never splits over devices, in the model's order.

    Raises JobInputError for a model that names none.
    """
    classes = set(model._no_split_modules or ())
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in classes and not any(name.startswith(f"{b}.") for b in found):
            found.append(name)
    if not found:
        raise JobInputError(
            f"Transformers does not say what the decoder blocks of {type(model).__name__} are.",
            hint="--set placement=resident",
            code="placement.no_blocks",
        )
    return found


def _config(job: Job) -> Any:
    return AutoConfig.from_pretrained(
        job.model, local_files_only=True, trust_remote_code=job.trust_remote_code
    )


def _asked(job: Job) -> dict[str, Any]:
    """What `from_pretrained` is asked for."""
    if job.placement == "resident":
        return {} if job.device == "cpu" else {"device_map": {"": job.device}}
    folder = _folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"offload_folder": str(folder), "offload_buffers": True}
    if job.placement == "layerwise":
        return {**shared, "device_map": _layerwise(job), "max_memory": {"cpu": _HOST}}
    return {**shared, "device_map": "sequential", "max_memory": _rooms(job.devices)}


def _layerwise(job: Job) -> dict[str, str]:
    """Decoder block → disk; every other module with weights or buffers of its own → the device."""
    model = empty_model(job)
    blocks = decoder_blocks(model)
    places = dict.fromkeys(blocks, "disk")
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not inside:
            places[name] = job.device
    return places


def _rooms(devices: list[str]) -> dict[int | str, int]:
    """Bytes that each device of this machine may take, and the host; 0 for those not asked for."""
    asked = {torch.device(device).index or 0 for device in devices}
    rooms: dict[int | str, int] = {
        index: int(FREE_SHARE * torch.cuda.mem_get_info(index)[0]) if index in asked else 0
        for index in range(torch.cuda.device_count())
    }
    return {**rooms, "cpu": _HOST}


def _folder(job: Job) -> Path:
    return Path(job.out) / _FOLDER
