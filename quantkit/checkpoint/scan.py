"""One pass over a source model's bytes before the long job: its fingerprint, and bad weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.progress import BytesDone
from quantkit.checkpoint.tensors import count_nonfinite, digest
from quantkit.errors import InputError


@dataclass(frozen=True)
class Scan:
    """`digests` is SHA-256 by tensor name; `bad` maps tensors to their count of NaN or infinite
    values."""

    fingerprint: str
    digests: dict[str, str]
    bad: dict[str, int]


def scan(checkpoint: Checkpoint, progress: BytesDone | None = None) -> Scan:
    """Read every tensor once, on two threads; `progress` gets the bytes done so far."""
    infos = [checkpoint.tensors[name] for name in sorted(checkpoint.tensors)]
    digests: dict[str, str] = {}
    bad: dict[str, int] = {}
    done = 0
    with ThreadPoolExecutor(2) as pool:
        counts = pool.map(count_nonfinite, infos)
        hashes = pool.map(digest, infos)
        for info, count, hashed in zip(infos, counts, hashes, strict=True):
            digests[info.name] = hashed
            if count:
                bad[info.name] = count
            done += info.bytes
            if progress:
                progress(done)
    return Scan(checkpoint.fingerprint(digests), digests, bad)


def refuse_bad_weights(found: Scan, checkpoint: Checkpoint) -> None:
    """Raise InputError that names the tensors holding NaN or infinity."""
    if not found.bad:
        return
    named = [f"{name} ({count} values)" for name, count in list(found.bad.items())[:3]]
    more = f" and {len(found.bad) - 3} more tensors" if len(found.bad) > 3 else ""
    raise InputError(
        f"{checkpoint.path} holds NaN or infinite weights: {', '.join(named)}{more}.",
        hint="download the model again, or ask its makers",
        code="source.nonfinite",
    )
