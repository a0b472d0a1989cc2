"""How many worker processes to start, within how much memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import ceil

from quantkit.backends.streaming.cut import working_bytes
from quantkit.backends.streaming.job import Layout, ShardTask
from quantkit.errors import InputError

BASE_BYTES = 320_000_000
"""This process, the process that forks the workers, and the libraries that all share."""

WORKER_BYTES = 40_000_000
"""What a worker adds before its first block."""

DEFAULT_BYTES = 400_000_000
"""What workers may take together, the largest tensor more, where no limit and no number is asked:
the default does not grow with the cores."""

MOST_WORKERS = 32

SMALL_BYTES = 100_000_000
"""A model of so many bytes is done before workers would have started: a process reads, quantizes
and writes 200 to 400 MB/s, and takes more than a second to import torch."""


def worker_count(
    tasks: Iterable[ShardTask], layout: Layout, jobs: int | None, memory: int | None
) -> int:
    """Workers to start: `jobs` (None: one a core), or fewer where they would pass `memory` bytes.

    With neither, a few hundred MB and the largest tensor are the limit, in which one worker always
    fits, and a small model has one. Raises InputError when not even one fits into `memory`.
    """
    count = jobs or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    if memory is None and jobs is not None:
        return count
    works = [work for task in tasks for work in task.works]
    each = WORKER_BYTES + max((working_bytes(work, layout) for work in works), default=0)
    if memory is None:
        if sum(work.tensor.bytes for work in works) <= SMALL_BYTES:
            return 1
        room = DEFAULT_BYTES + max((work.tensor.bytes for work in works), default=0)
        return max(1, min(count, room // each))
    fitting = (memory - BASE_BYTES) // each
    if fitting < 1:
        needed = ceil((BASE_BYTES + each) / 1e6)
        raise InputError(
            f"--memory {memory / 1e6:.0f}MB is too little: one worker needs {needed} MB here, its "
            "libraries included.",
            hint=f"--memory {needed}MB or more",
            code="stream.memory",
        )
    return min(count, fitting)
