"""Kernels that start before the one before them has ended (programmatic dependent launch, Hopper).

A kernel first lets the next one start, reads what no kernel writes (weights), and then waits for
the one before it: the time between two launches is spent reading. Every kernel launched so must
wait before it touches anything that another one writes or reads; `QuantLinear` sees to it that a
weight is complete before the first of them is started.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def early(device: torch.device) -> bool:
    """Whether the device can start kernels so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()
