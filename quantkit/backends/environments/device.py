"""Which device a job runs on, found without loading torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from quantkit.errors import InputError

_STATED = re.compile(r"^(cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
_SEVERAL = re.compile(r"(cuda|npu|xpu):\d+(,\d+)+")
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


def resolve_devices(asked: str) -> tuple[str, ...]:
    """The devices themselves, in order: one as `resolve_device` gives it, or those of `cuda:0,1`.

    Raises InputError as `resolve_device`, and for a device that is named twice.
    """
    if not _SEVERAL.fullmatch(asked):
        return (resolve_device(asked),)
    kind, _, numbers = asked.partition(":")
    devices = tuple(f"{kind}:{int(number)}" for number in numbers.split(","))
    if len(set(devices)) < len(devices):
        raise InputError(
            f"--device {asked} names a device twice.",
            hint=f"--device {kind}:0,1",
            code="request.device",
        )
    return devices


def devices_named(devices: Sequence[str]) -> str:
    """What `--device` calls them: `cuda:0,1` for `cuda:0` and `cuda:1`, one by its own name."""
    first, *others = devices
    return ",".join([first, *(device.partition(":")[2] for device in others)])


def _found() -> str:
    if Path("/dev/davinci_manager").exists():
        return "npu:0"
    build = torch_build()
    nvidia = has_nvidia_gpu() and build == "cuda" and not _hidden("CUDA_VISIBLE_DEVICES")
    amd = has_amd_gpu() and build == "hip" and not _hidden(*_AMD_MASKS)
    return "cuda" if nvidia or amd else "cpu"  # torch calls AMD's cuda too


_AMD_MASKS = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def _hidden(*names: str) -> bool:
    return any(os.environ.get(name) in ("", "-1") for name in names)


def torch_build() -> Literal["cuda", "hip", "cpu"]:
    """What the installed torch is built for, as its version file says; "cpu" without torch."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if file is None or not file.is_file():
        return "cpu"
    stated = dict(_STATED.findall(file.read_text(encoding="utf-8")))
    return "hip" if "hip" in stated else "cuda" if "cuda" in stated else "cpu"


def amd_note() -> str | None:
    """What works with the AMD GPU of this machine, None where there is none."""
    if not has_amd_gpu():
        return None
    if torch_build() != "hip":
        return (
            "an AMD GPU is here, but this torch is not built for ROCm, so the CPU is used; "
            "install torch's ROCm build to use it"
        )
    return (
        "AMD GPU (ROCm): untested. rtn_* methods and plan, verify, launch need no GPU; libraries "
        "calibrate as far as they support ROCm; validate computes with plain PyTorch, as the "
        "kernels and the vLLM and SGLang environments here are for NVIDIA GPUs. What engines run: "
        "quantkit platforms --gpu mi300x"
    )


def has_amd_gpu() -> bool:
    """Whether the driver of an AMD GPU is loaded (its compute device is there)."""
    return Path("/dev/kfd").exists()


def has_nvidia_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is loaded (its control device is there)."""
    return Path("/dev/nvidiactl").exists()
