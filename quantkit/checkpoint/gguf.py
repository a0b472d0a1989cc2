"""A directory that holds one GGUF file (llama.cpp), read with the `gguf` package.

GGUF is a container of its own: types, shapes and the tokenizer are inside the file, and there is no
config.json. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from quantkit.errors import InputError

FLOAT_TYPES = frozenset({"F32", "F16", "BF16", "F64"})


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its ggml type ("Q4_K", "F32", …), and its shape in torch's order, [out, in]."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    raw: Any
    """NumPy array of the stored bytes or values, mapped from the file."""

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def quantized(self) -> bool:
        return self.type not in FLOAT_TYPES

    def values(self) -> Any:
        """The dequantized values as a float32 NumPy array of `shape`."""
        import gguf
        import numpy as np

        kind = gguf.GGMLQuantizationType[self.type]
        with np.errstate(over="ignore", invalid="ignore"):  # damaged scales may be infinite
            values = gguf.quants.dequantize(self.raw, kind)
        return np.asarray(values).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """What `open_gguf` read; `metadata` are the file's keys with plain Python values."""

    path: Path
    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    @cached_property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, over the quantized tensors."""
        quantized = [tensor for tensor in self.tensors.values() if tensor.quantized]
        return 8 * sum(t.bytes for t in quantized) / max(1, sum(t.elements for t in quantized))

    def digest(self, name: str) -> str:
        """SHA-256 over type, shape and bytes of one tensor."""
        tensor = self.tensors[name]
        total = hashlib.sha256(f"{tensor.type}{list(tensor.shape)}".encode())
        total.update(tensor.raw.tobytes())
        return total.hexdigest()

    def digests(self) -> dict[str, str]:
        """Every tensor's digest, by name."""
        return {name: self.digest(name) for name in sorted(self.tensors)}


def gguf_in(path: Path) -> Path | None:
    """The GGUF file of a directory that is such a container, else None."""
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    return found[0] if found else None


def open_gguf(path: Path) -> GgufFile:
    """Read the one GGUF file of a directory.

    Raises InputError: `gguf.several` for more than one, `gguf.unreadable` for a file that is
    truncated or malformed.
    """
    import gguf

    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(
            f"{path} holds {len(files)} GGUF files, not one.",
            hint="keep one model a directory; a split file is to be merged with llama-gguf-split",
            code="gguf.several",
        )
    try:
        reader = gguf.GGUFReader(str(files[0]))
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            t.name: GgufTensor(
                t.name,
                t.tensor_type.name,
                tuple(int(n) for n in reversed(t.shape.tolist())),
                int(t.n_bytes),
                t.data,
            )
            for t in reader.tensors
        }
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{files[0]} cannot be read as GGUF: {' '.join(str(error).split())[:300]}",
            hint=f"copy or make {files[0].name} again",
            code="gguf.unreadable",
        ) from error
    return GgufFile(path, files[0], metadata, tensors)
