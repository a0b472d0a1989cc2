"""Memory that is free on this machine, found without loading torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from quantkit.backends.environments.device import devices_named, has_amd_gpu, has_nvidia_gpu
from quantkit.errors import InputError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
_LOOK = ("nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits")
_LOOK_SECONDS = 20


def host_room() -> int | None:
    """Bytes that are free in host memory, within a container's limit; None where nothing tells."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line[:13] == "MemAvailable:"), 0)
    limit = _cgroup_room()
    return min(free, limit) if limit is not None else free


def device_room(device: str) -> int | None:
    """Bytes that are free on `cuda` or `cuda:N`, as NVIDIA's driver says; None where it does not.

    N counts the GPUs that CUDA_VISIBLE_DEVICES leaves, by their numbers there; GPUs that it names
    in another way, and other accelerators, are not looked at.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    number = int(index or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = visible.split(",")[number : number + 1]
        if not named or not named[0].strip().isdigit():
            return None
        number = int(named[0])
    return gpu_rooms().get(number)


def gpu_rooms() -> dict[int, int]:
    """Index → free bytes of every NVIDIA GPU that the driver tells of."""
    try:
        told = subprocess.run(
            _LOOK, capture_output=True, text=True, timeout=_LOOK_SECONDS, check=True
        ).stdout
        rows = [line.split(",") for line in told.splitlines() if line.strip()]
        return {int(index): int(free) << 20 for index, free in rows}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def refuse_absent_gpus(devices: Sequence[str]) -> None:
    """InputError (`request.device`) for a `cuda:N` that this machine has not."""
    absent = absent_gpus(devices)
    if absent:
        raise InputError(
            f"{', '.join(absent)} of --device {devices_named(devices)} cannot be had: this machine "
            "has no such GPU.",
            hint="--device cpu or auto, or another number: nvidia-smi lists those that are here",
            code="request.device",
        )


def absent_gpus(devices: Sequence[str]) -> list[str]:
    """Those of `cuda:N` that this machine, or what CUDA_VISIBLE_DEVICES leaves of it, has not, as
    NVIDIA's driver says; of AMD's nothing is known."""
    wanted = [device for device in devices if device.partition(":")[0] == "cuda"]
    if not wanted:
        return []
    rooms, visible = gpu_rooms(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not rooms:
        return [] if has_nvidia_gpu() or has_amd_gpu() else wanted
    count = len(rooms) if visible is None else len([name for name in visible.split(",") if name])
    return [device for device in wanted if int(device.partition(":")[2] or 0) >= count]


def _cgroup_room() -> int | None:
    """What a container's limit leaves; None without one."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = (CGROUP / "memory.stat").read_text().split("\n")
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None
    cached = next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
    return int(limit) - used + cached
