"""Tensors read with plain file reads, so that memory holds one layer and never a mapped model:
whole or in pieces, their digest, their NaN and infinities."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from quantkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.headers import TensorInfo

Bytes = npt.NDArray[np.uint8]

PIECE = 1 << 20
"""Bytes a piece: fits the cache, a multiple of every element's size."""

_MAGNITUDE: dict[str, tuple[str, int, int]] = {
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F64": ("<u8", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E5M2": ("u1", 0x7F, 0x7C),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
}
"""Dtype → unsigned view, mask of the magnitude bits, smallest magnitude that is NaN or infinite."""


@cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """A dtype's name in a safetensors header → torch's, for those that torch has."""
    import torch

    return {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16,
        "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32,
        "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64, "I64": torch.int64,
        "F64": torch.float64,
    }  # fmt: skip


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor's values in the dtype of the file, in memory of its own."""
    import torch

    dtypes = torch_dtypes()
    if info.dtype not in dtypes:
        raise InputError(
            f"{info.name} is stored as {info.dtype}, which cannot be read here.",
            hint="export the checkpoint with FP4 codes packed in U8",
            code="checkpoint.unreadable_dtype",
        )
    data = torch.empty(info.bytes, dtype=torch.uint8)
    with info.file.open("rb", buffering=0) as handle:
        read_into(handle.fileno(), data.numpy().data, info)
    return data.view(dtypes[info.dtype]).reshape(info.shape)


def pieces(info: TensorInfo) -> Iterator[Bytes]:
    """The tensor's bytes in order, `PIECE` at a time; each is valid until the next is asked for."""
    buffer = np.empty(min(PIECE, info.bytes), dtype=np.uint8)
    with info.file.open("rb", buffering=0) as handle:
        for at in range(0, info.bytes, PIECE):
            piece = buffer[: min(PIECE, info.bytes - at)]
            read_into(handle.fileno(), piece.data, info, at)
            yield piece


def tensor_hash(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """SHA-256 that has taken in what a tensor's digest has before its bytes."""
    return hashlib.sha256(f"{dtype}{list(shape)}".encode())


def digest(info: TensorInfo) -> str:
    """SHA-256 over dtype, shape and bytes of a tensor."""
    total = tensor_hash(info.dtype, info.shape)
    for piece in pieces(info):
        total.update(piece.data)
    return total.hexdigest()


def count_nonfinite(info: TensorInfo) -> int:
    """How many values of a floating-point tensor are NaN or infinite (0 for other dtypes)."""
    if info.dtype not in _MAGNITUDE:
        return 0
    view, mask, limit = _MAGNITUDE[info.dtype]
    total = 0
    for piece in pieces(info):
        magnitude = piece.view(view) & np.dtype(view).type(mask)
        if magnitude.size and int(magnitude.max()) >= limit:
            total += int(np.count_nonzero(magnitude >= limit))
    return total


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        np.array_equal(a, b) for a, b in zip(pieces(one), pieces(other), strict=True)
    )  # fmt: skip


def read_into(file: int, view: memoryview, info: TensorInfo, start: int = 0) -> None:
    """Fill `view` with the tensor's bytes from `start` on; `file` is its shard's descriptor.

    Raises InputError at a short end.
    """
    at = info.start + start
    while view:
        done = os.preadv(file, [view], at)
        if not done:
            raise InputError(
                f"{info.file} ends inside tensor {info.name}.",
                hint=f"download or copy {info.file.name} again, then retry",
                code="checkpoint.truncated",
            )
        view, at = view[done:], at + done
