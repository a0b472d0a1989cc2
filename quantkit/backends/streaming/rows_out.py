"""Write one safetensors file whose layout is known before its bytes are.

The header goes first (https://github.com/huggingface/safetensors#format); each tensor is then
written and hashed in order, any number of tensors at a time.
"""

from __future__ import annotations

import os
from pathlib import Path
from secrets import token_hex

from quantkit.backends.streaming.job import WRITING, ShardTask, entry_bytes
from quantkit.checkpoint.headers import header_bytes
from quantkit.checkpoint.tensors import tensor_hash

Buffer = bytes | bytearray | memoryview

HELD_BYTES = 1 << 16


class ShardFile:
    """A file of its full size with its header, under a name of its own; `places` are the offsets
    of its tensors."""

    def __init__(self, folder: Path, task: ShardTask) -> None:
        outputs = task.outputs
        self.path = folder / f"{task.file}.{token_hex(4)}{WRITING}"
        header, self.places = header_bytes(outputs)
        self.size = len(header) + sum(entry_bytes(*outputs[name]) for name in outputs)
        self.path.write_bytes(header)
        os.truncate(self.path, self.size)


class Sink:
    """One tensor of the file: takes its bytes in order and hashes them as `Checkpoint.digest`."""

    def __init__(self, file: int, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        self._file, self._at = file, offset
        self._end = offset + entry_bytes(dtype, shape)
        self._hash = tensor_hash(dtype, shape)
        self._held = bytearray()

    def write(self, data: Buffer) -> None:
        """Take the next bytes; few at a time are held back until there are more."""
        view = memoryview(data).cast("B")
        if len(self._held) + len(view) < HELD_BYTES:
            self._held += view
            return
        self._flush()
        self._put(view)

    def close(self) -> str:
        """Write what was held back; the digest of the tensor, which must be complete."""
        self._flush()
        assert self._at == self._end, "fewer bytes than the header declares"
        return self._hash.hexdigest()

    def _flush(self) -> None:
        self._put(memoryview(self._held))
        self._held = bytearray()

    def _put(self, view: memoryview) -> None:
        assert self._at + len(view) <= self._end, "more bytes than the header declares"
        self._hash.update(view)
        write_all(self._file, view, self._at)
        self._at += len(view)


def write_all(file: int, data: Buffer, offset: int) -> None:
    """`os.pwrite` until everything is written."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done
