"""What the streaming backend is asked to do and what it did (standard library only).

Everything here can be pickled, so that a shard's task can run in another process or machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from quantkit.checkpoint.directory import DTYPE_BITS, TensorInfo
from quantkit.checkpoint.schemes import Scheme

Layout = Literal["compressed-tensors", "gptq", "awq"]
Outputs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name → safetensors dtype and shape."""

WRITING = ".writing"
"""The suffix of an output file that is not finished."""


@dataclass(frozen=True)
class StreamOptions:
    """The choices that shape the output's bytes, beside each layer's scheme.

    `clip="mse"` searches each integer scale for the least squared error (where two are equal but
    for rounding, a GPU may choose the other); `on_nan="keep16"` leaves layers with NaN or infinity,
    and those that must have the same scheme, in 16 bit instead of refusing them.
    """

    layout: Layout = "compressed-tensors"
    clip: Literal["none", "mse"] = "none"
    on_nan: Literal["error", "keep16"] = "error"


@dataclass(frozen=True)
class Slice:
    """`rows` rows of one matrix of a tensor: every `step`-th from `first` on.

    A 2-D tensor holds one matrix; a fused expert tensor holds one an expert, number `matrix`, which
    `transposed` stores as [in, out] (the only way in which a `step` other than 1 is read). `scale`
    are the inverse scales of an FP8 tensor in square blocks (DeepSeek), `block` their size.
    """

    tensor: TensorInfo
    first: int
    rows: int
    columns: int
    matrix: int = 0
    transposed: bool = False
    scale: TensorInfo | None = None
    block: tuple[int, int] = (128, 128)
    step: int = 1

    @property
    def row_bytes(self) -> int:
        return self.columns * DTYPE_BITS[self.tensor.dtype] // 8


@dataclass(frozen=True)
class Piece:
    """One linear layer to quantize; `fused` are the slices that share its FP4 global scale.

    `layer` is the plan's name of it, which for an expert of a fused tensor is the tensor's.
    """

    layer: str
    module: str
    scheme: Scheme
    source: Slice
    fused: tuple[Slice, ...] = ()


@dataclass(frozen=True)
class Work:
    """All that is made from one source tensor: quantized pieces in its order, or a copy.

    `dequantized` is the whole of a tensor in FP8 with inverse scales whose copy is bfloat16.
    `biases`: of the biases [experts, out] of all experts, the part that each output has.
    """

    tensor: TensorInfo
    pieces: tuple[Piece, ...]
    dequantized: Slice | None
    outputs: Outputs
    biases: Mapping[str, Slice] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardTask:
    """One output file; independent of all others."""

    file: str
    works: tuple[Work, ...]

    @property
    def outputs(self) -> Outputs:
        return {name: entry for work in self.works for name, entry in work.outputs.items()}

    @property
    def read_bytes(self) -> int:
        return sum(work.tensor.bytes for work in self.works)

    @property
    def write_bytes(self) -> int:
        return sum(entry_bytes(*entry) for entry in self.outputs.values())


@dataclass(frozen=True)
class LayerError:
    """Sums over a layer's weights: squared errors and squares (see `rtn.Rows`)."""

    noise: float
    signal: float


@dataclass(frozen=True)
class WorkOrder:
    """A work for a worker process: `places` are the offsets of its outputs in `file`; `hashed` asks
    for the digest of the source tensor."""

    number: int
    work: Work
    file: Path
    places: Mapping[str, int]
    hashed: bool


@dataclass
class WorkRecord:
    """What a finished work wrote and read: tensor digests, and the layers' errors."""

    digests: dict[str, str] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LayerError] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, other: WorkRecord) -> None:
        """Add another's."""
        self.digests.update(other.digests)
        self.source.update(other.source)
        self.layers.update(other.layers)
        self.notes += other.notes


@dataclass
class ShardRecord:
    """A finished shard: its file's name and size in bytes, and what its works did together."""

    file: str
    size: int = 0
    done: WorkRecord = field(default_factory=WorkRecord)


@dataclass(frozen=True)
class StreamResult:
    """What was written.

    digests: every output tensor by `Checkpoint.digest`'s rule; source_digests: every source tensor.
    relative_error, sqnr_db: by quantized layer, ‖W − Wq‖ / ‖W‖ and 20 log10 of its inverse; for FP8
        with a scale a row or block over a quarter of the columns.
    kept: module → reason, for layers that `on_nan` left in 16 bit.
    seconds: by stage; resumed: files that an earlier run had finished; peak_memory: resident bytes.
    """

    digests: dict[str, str]
    source_digests: dict[str, str]
    relative_error: dict[str, float]
    sqnr_db: dict[str, float]
    kept: dict[str, str]
    notes: list[str]
    seconds: dict[str, float]
    resumed: list[str]
    peak_memory: int


def entry_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that safetensors dtype and shape."""
    return prod(shape) * DTYPE_BITS[dtype] // 8
