"""The devices a checkpoint may be served on, by name and by generation."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from quantkit.engines.rules import DATA
from quantkit.errors import InputError

Vendor = Literal["nvidia", "amd", "ascend"]


@dataclass(frozen=True)
class Gpu:
    """One device; `capability` is NVIDIA's compute capability times ten, 0 elsewhere."""

    key: str
    name: str
    generation: str
    vendor: Vendor
    capability: int = 0


@cache
def platforms() -> dict[str, Any]:
    """The data file, as it stands."""
    raw: dict[str, Any] = yaml.safe_load((DATA / "platforms.yaml").read_text(encoding="utf-8"))
    return raw


@cache
def generations() -> dict[str, tuple[Gpu, ...]]:
    """Every generation with its devices, oldest first within a vendor."""
    return {
        name: tuple(
            Gpu(str(key), device, entry["name"], entry["vendor"], entry.get("capability", 0))
            for key, device in entry["gpus"].items()
        )
        for name, entry in platforms()["generations"].items()
    }


def gpu_named(name: str, option: str = "--gpu") -> Gpu:
    """The device of that name (h100, mi300x, …), or the first of that generation (hopper, …).

    Raises InputError with the known names; `option` is what the name was given to.
    """
    wanted = name.lower().replace(" ", "").replace("_", "-")
    for generation, devices in generations().items():
        if wanted == generation.replace("_", "-"):
            return devices[0]
        for gpu in devices:
            if wanted in (gpu.key, gpu.name.lower().replace(" ", "")):
                return gpu
    known = ", ".join(gpu.key for devices in generations().values() for gpu in devices)
    raise InputError(
        f"{option} {name} is not known.",
        hint=f"one of {known}; or a generation: {', '.join(generations())}",
        code="request.gpu",
    )


def gpu_here() -> Gpu | None:
    """The first accelerator of this machine, None without one that is known."""
    if Path("/dev/davinci_manager").exists():
        return generations()["a2"][0]
    for command in (
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        ["rocm-smi", "--showproductname", "--csv"],
    ):
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        found = _mentioned(done.stdout) if done.returncode == 0 else None
        if found is not None:
            return found
    return None


def _mentioned(text: str) -> Gpu | None:
    words = text.lower().replace(" ", "").replace("-", "")
    every = [gpu for devices in generations().values() for gpu in devices]
    named = [gpu for gpu in every if gpu.name.lower().replace(" ", "") in words]
    return max(named, key=lambda gpu: len(gpu.name), default=None)
