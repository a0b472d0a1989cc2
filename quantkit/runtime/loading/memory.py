"""Memory that a load no longer needs goes back to the system at once; a forward pass keeps it.

glibc keeps freed buffers of up to 32 MiB for later (its threshold for mapping grows with what is
freed), so that a load which reads, joins and packs layer by layer would end with up to half of the
model again in unused pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch


def release() -> None:
    """Give the pages of freed buffers back; nothing where the C library cannot."""
    trim = _trim()
    if trim is not None:
        trim(0)


def keep() -> None:
    """From now on glibc keeps the freed buffers of a forward pass for the next operation.

    Freeing one large allocation raises its thresholds (mallopt(3), M_TRIM_THRESHOLD). Below them
    every operation on some thousand tokens gets new pages, whose zeroing takes an eighth of a
    prefill.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@cache
def _trim() -> Callable[[int], object] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return None
