"""A rank's part of a job whose samples several processes share (`process/ranks.py`).

Every function leaves a job of one process as it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from quantkit.backends.adapters.seen_tokens import Tokens
from quantkit.backends.process.job import Job, token_digest


@contextmanager
def joined(job: Job) -> Iterator[None]:
    """Be rank `job.rank` of a process group; at the end all ranks are done with each other."""
    if job.rank is None:
        yield
        return
    cuda = job.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(job.device)
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{job.meeting}",
        rank=job.rank,
        world_size=len(job.devices),
        device_id=torch.device(job.device) if cuda else None,
    )
    yield
    distributed.barrier()
    distributed.destroy_process_group()


def share(tokens: Tokens, job: Job) -> Tokens:
    """The samples of this rank: a stretch of the file, one longer at most than others."""
    if job.rank is not None:
        ranks, count = len(job.devices), len(tokens)
        own = slice(count * job.rank // ranks, count * (job.rank + 1) // ranks)
        tokens.ids, tokens.masks = tokens.ids[own], tokens.masks[own]
    return tokens


def of_all_ranks(summary: dict[str, Any], seen: list[array[int]], job: Job) -> dict[str, Any]:
    """`Result.calibration` of all ranks together: `seen` are the samples that reached this one."""
    if job.rank is None:
        return summary
    samples = summary["samples"]
    gathered: list[Any] = [None] * len(job.devices)
    distributed.all_gather_object(gathered, [ids.tolist() for ids in seen[:samples]])
    whole = [ids for part in gathered for ids in part]
    return {
        **summary,
        "samples": len(whole),
        "tokens": sum(len(ids) for ids in whole),
        "digest": token_digest(whole),
    }
