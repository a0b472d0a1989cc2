"""Which devices work, on how many threads, within how much memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable

import torch

from quantkit.errors import InputError
from quantkit.streaming.blocks import block_rows
from quantkit.streaming.job import Layout, ShardTask, Work, entry_bytes

_BLOCK_COPIES = 40
"""Bytes at work a weight of a block: its float32 copies, codes and scratch (measured)."""

_MOST_THREADS = 16


def find_devices(wanted: str) -> list[str]:
    """The torch devices to use: `auto` and `cuda` are all GPUs that there are."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if wanted in ("auto", "cuda") and gpus:
        return gpus
    return ["cpu" if wanted == "auto" else wanted]


def thread_count(
    tasks: Iterable[ShardTask],
    layout: Layout,
    devices: list[str],
    jobs: int | None,
    memory: int | None,
) -> int:
    """Threads to start: `jobs`, or fewer where they would pass `memory` bytes.

    Raises InputError when not even one fits.
    """
    count = jobs or min(os.cpu_count() or 1, _MOST_THREADS)
    count = max(count, len(devices))
    if memory is None:
        return count
    works = [work for task in tasks for work in task.works]
    each = max((_working_bytes(work, layout, devices[0]) for work in works), default=0)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fitting = (memory - base) // max(each, 1)
    if fitting < 1:
        raise InputError(
            f"--memory {memory / 1e6:.0f} MB is too little: {base / 1e6:.0f} MB are in use before "
            f"the first tensor, and one thread needs {each / 1e6:.0f} MB.",
            hint=f"--memory {(base + each) / 1e6 + 1:.0f}MB or more",
            code="stream.memory",
        )
    return min(count, fitting)


def _working_bytes(work: Work, layout: Layout, device: str) -> int:
    """What a thread holds at most while it does this work."""
    if not work.pieces:
        return 4 << 20
    part = work.pieces[0].source
    needed = block_rows(part, work.pieces[0].scheme.weight, torch.device(device).type)
    needed *= part.columns * _BLOCK_COPIES
    if part.transposed:
        needed += part.tensor.bytes // part.tensor.shape[0]
    if layout != "compressed-tensors":
        needed += sum(entry_bytes(*entry) for entry in work.outputs.values())
    return needed
