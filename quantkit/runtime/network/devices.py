"""A decoder over several devices: equal parts of its layers, one part after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shares(count: int, devices: Sequence[torch.device]) -> list[torch.device]:
    """The device of each of `count` layers; parts differ by one layer at most."""
    return [devices[index * len(devices) // count] for index in range(count)]


def enter(device: torch.device) -> None:
    """Make a GPU the current one: Triton starts kernels there."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
