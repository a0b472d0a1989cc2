"""Memory that a load no longer needs goes back to the system at once.

glibc keeps freed buffers of up to 32 MiB for later (its threshold for mapping grows with what is
freed), so that a load which reads, joins and packs layer by layer would end with up to half of the
model again in unused pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def release() -> None:
    """Give the pages of freed buffers back; nothing where the C library cannot."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], object] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return None
