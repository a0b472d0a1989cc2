"""Write one safetensors file whose layout is known before its bytes are.

The header goes first (https://github.com/huggingface/safetensors#format); each tensor is then
written and hashed in order, any number of tensors at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

from quantkit.checkpoint import DTYPE_BITS
from quantkit.streaming.job import Outputs, entry_bytes

Buffer = bytes | bytearray | memoryview


class ShardWriter:
    """The file under `path`; complete when every tensor's sink is full."""

    def __init__(self, path: Path, outputs: Outputs) -> None:
        self.path = path
        self._outputs = outputs
        self._offsets: dict[str, int] = {}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(outputs, key=lambda n: (-DTYPE_BITS[outputs[n][0]], n)):
            dtype, shape = outputs[name]
            end = at + entry_bytes(dtype, shape)
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            self._offsets[name] = at
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self.size = self._data + at
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.truncate(self._file, self.size)
            write_all(self._file, struct.pack("<Q", len(text)) + text, 0)
        except OSError:
            self.close()
            raise

    def sink(self, name: str) -> Sink:
        """Where the bytes of one tensor go."""
        dtype, shape = self._outputs[name]
        return Sink(self._file, self._data + self._offsets[name], dtype, shape)

    def close(self) -> None:
        os.close(self._file)


class Sink:
    """One tensor of the file: takes its bytes in order and hashes them as `Checkpoint.digest`."""

    def __init__(self, file: int, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        self._file, self._at = file, offset
        self._end = offset + entry_bytes(dtype, shape)
        self._hash = tensor_hash(dtype, shape)

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        assert self._at + len(view) <= self._end, "more bytes than the header declares"
        self._hash.update(view)
        write_all(self._file, view, self._at)
        self._at += len(view)

    def digest(self) -> str:
        """The digest of the full tensor."""
        assert self._at == self._end, "fewer bytes than the header declares"
        return self._hash.hexdigest()


def tensor_hash(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """A hash that has taken in what `Checkpoint.digest` puts before the bytes."""
    return hashlib.sha256(f"{dtype}{list(shape)}".encode())


def write_all(file: int, data: Buffer, offset: int) -> None:
    """`os.pwrite` until everything is written."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done
