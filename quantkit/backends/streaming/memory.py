"""What a tree of processes holds in memory, each shared page counted by its share."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic

LOOK_SECONDS = 0.5
PROC = Path("/proc")


class MemoryWatch:
    """The most that this process and its descendants held, in bytes, at the looks taken."""

    def __init__(self) -> None:
        self.peak = 0
        self._next = 0.0

    def look(self) -> None:
        """Look, unless the last look was a moment ago."""
        now = monotonic()
        if now >= self._next:
            self.peak = max(self.peak, tree_memory(os.getpid()))
            self._next = now + LOOK_SECONDS


def tree_memory(pid: int) -> int:
    """Bytes (proportional set size, mapped files included) of a process and its descendants.

    0 where the kernel does not tell.
    """
    try:
        rollup = (PROC / str(pid) / "smaps_rollup").read_text()
        children = (PROC / str(pid) / "task").iterdir()
        below = {
            int(child) for task in children for child in (task / "children").read_text().split()
        }
    except (OSError, ValueError):
        return 0
    own = next((int(line.split()[1]) for line in rollup.splitlines() if line[:4] == "Pss:"), 0)
    return own * 1024 + sum(map(tree_memory, below))
