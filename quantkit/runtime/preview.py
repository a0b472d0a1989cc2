"""Which kernel each layer of a checkpoint would get on a device: from headers, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.schemes import Scheme
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.select import KERNELS, choose
from quantkit.runtime.load import (
    check_kernel,
    check_one_device,
    expanded_records,
    open_path,
    pick_dtype,
    read_config,
)
from quantkit.runtime.loading.as_served import as_served, gpu_to_serve
from quantkit.runtime.loading.cache_scales import cache_scales
from quantkit.runtime.loading.hosted import empty_model
from quantkit.runtime.loading.make_layers import LayerRecord
from quantkit.runtime.loading.source import CheckpointReader
from quantkit.runtime.network.decoder import unsupported


def available(device: torch.device) -> dict[str, str | None]:
    """Every kernel in the order of preference → why it cannot run on the device, or None."""
    return {kernel.NAME: kernel.unavailable(device) for kernel in KERNELS}


def preview(
    path: Path, device: torch.device, kernel: str = "auto", as_on: str = ""
) -> list[LayerRecord]:
    """The records that `load` would make. Raises what `load` raises before it reads weights.

    An asymmetric weight counts as one with zero points, which loading may find to be all alike.
    """
    source, _, dtype, allowed = _opened(path, kernel)
    records = []
    gpu = gpu_to_serve(as_on, device)
    for name, spec in source.layers.items():
        scheme = as_served(source.layout, spec, gpu, name, spec.shape)
        choice = choose(_layer(name, scheme, spec.shape, dtype), device, allowed)
        names = [f"{name}[{number}]" for number in range(spec.experts)] or [name]
        records += [LayerRecord.of(one, spec.scheme, scheme, choice) for one in names]
    return records + expanded_records(source)


def refuse(
    path: Path, devices: Sequence[torch.device], kernel: str = "auto", as_on: str = ""
) -> None:
    """Raise what `load` would raise for the declaration, the config, the kernel or scales of the
    cache: no weight is read. A weight that is declared asymmetric may turn out to need no zero
    points."""
    source, config, dtype, allowed = _opened(path, kernel)
    cache_scales(source, config)
    if other := unsupported(config):
        check_one_device(devices, other)
        empty_model(config, path, dtype)
    gpu = gpu_to_serve(as_on, devices[0])
    for name, spec in source.layers.items():
        scheme = as_served(source.layout, spec, gpu, name, spec.shape)
        choose(LayerDescription(name, scheme, spec.shape, dtype), devices[0], allowed)


def _opened(path: Path, kernel: str) -> tuple[CheckpointReader, Any, torch.dtype, list[str]]:
    """The checkpoint, its config and dtype, and the kernels that may be chosen (empty: all)."""
    source = open_path(path)
    check_kernel(source, kernel)
    config = read_config(source)
    return source, config, pick_dtype(config, "auto"), [] if kernel == "auto" else [kernel]


def _layer(
    name: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> LayerDescription:
    number = scheme.weight
    return LayerDescription(name, scheme, shape, dtype, number.is_int and not number.symmetric)
