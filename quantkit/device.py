"""Which device a job runs on, found without loading torch."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

from quantkit.errors import InputError

_KNOWN = re.compile(r"cpu|(cuda|npu|xpu)(:\d+)?")


def resolve_device(asked: str) -> str:
    """The device itself for "auto": an accelerator that torch can use here, else "cpu".

    Raises InputError for a name that is none of auto, cpu, cuda, cuda:N, npu:N, xpu:N.
    """
    if asked == "auto":
        return _found()
    if not _KNOWN.fullmatch(asked):
        raise InputError(
            f"--device {asked} is no device.",
            hint="auto, cpu, cuda, cuda:N, npu:N or xpu:N",
            code="request.device",
        )
    return asked


def _found() -> str:
    if Path("/dev/davinci_manager").exists():
        return "npu:0"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    try:
        cpu_build = metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        cpu_build = True
    return "cuda" if has_nvidia_gpu() and not hidden and not cpu_build else "cpu"


def has_nvidia_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is loaded (its control device is there)."""
    return Path("/dev/nvidiactl").exists()
