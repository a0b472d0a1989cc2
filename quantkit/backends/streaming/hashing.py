"""SHA-256 of tensors by `Checkpoint.digest`'s rule, and of a source while there is time for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from threading import Event, Thread

from quantkit.checkpoint.directory import TensorInfo

PIECE = 1 << 20


def tensor_hash(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """A hash that has taken in what `Checkpoint.digest` puts before the bytes."""
    return hashlib.sha256(f"{dtype}{list(shape)}".encode())


class HashAhead:
    """Hashes tensors in order on a thread, from the start of the context to its end.

    `digests` has those that were reached; a tensor that cannot be read is left out.
    """

    def __init__(self, tensors: Iterable[TensorInfo]) -> None:
        self.digests: dict[str, str] = {}
        self._tensors = tensors
        self._stop = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> HashAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for info in self._tensors:
            digest = self._digest(info)
            if digest is None:
                return
            self.digests[info.name] = digest

    def _digest(self, info: TensorInfo) -> str | None:
        total = tensor_hash(info.dtype, info.shape)
        buffer = bytearray(PIECE)
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.start)
                left = info.bytes
                while left:
                    view = memoryview(buffer)[: min(left, PIECE)]
                    count = file.readinto(view)
                    if not count or self._stop.is_set():
                        return None
                    total.update(view[:count])
                    left -= count
        except OSError:
            return None
        return total.hexdigest()
