"""One pass over a source model's bytes before the long job: its fingerprint, and bad weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.progress import BytesDone
from quantkit.errors import InputError

_EXPONENT: dict[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
"""Dtype → its unsigned view and exponent mask; all exponent bits set is NaN or infinite."""

_PIECE = 1 << 20


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
        counts = pool.map(_count_bad, infos)
        hashes = pool.map(lambda info: checkpoint.digest(info.name), infos)
        for info, count, digest in zip(infos, counts, hashes, strict=True):
            digests[info.name] = digest
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


def _count_bad(info: TensorInfo) -> int:
    if info.dtype not in _EXPONENT or not info.elements:
        return 0
    view, mask = _EXPONENT[info.dtype]
    values = np.memmap(info.file, dtype=view, mode="r", offset=info.start, shape=(info.elements,))
    wide = np.dtype(view).type(mask)
    return sum(
        int(np.count_nonzero((values[at : at + _PIECE] & wide) == wide))
        for at in range(0, info.elements, _PIECE)
    )
