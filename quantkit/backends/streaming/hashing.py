"""SHA-256 of a source's tensors while there is time for it."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Event, Thread

from quantkit.checkpoint.directory import TensorInfo
from quantkit.checkpoint.tensors import pieces, tensor_hash
from quantkit.errors import InputError


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
        try:
            for piece in pieces(info):
                if self._stop.is_set():
                    return None
                total.update(piece.data)
        except (OSError, InputError):
            return None
        return total.hexdigest()
