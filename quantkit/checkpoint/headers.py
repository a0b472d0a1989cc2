"""Safetensors headers and JSON documents, read as strictly as the safetensors library reads them.

Only the standard library is used, so that a plan needs neither torch nor safetensors. Format:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from quantkit.errors import InputError

MAX_HEADER = 100_000_000
MAX_DEPTH = 64

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its shard's header describes it; `start` and `end` are file offsets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    stored: str | None = None
    """The name in the file, where that is another."""

    @property
    def bytes(self) -> int:
        return self.end - self.start

    @property
    def elements(self) -> int:
        return prod(self.shape)


def broken(file: Path, what: str, code: str) -> InputError:
    """The refusal of a file that was written or copied wrongly."""
    return InputError(
        f"{file} {what}.", hint=f"download or copy {file.name} again, then retry", code=code
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError when it is not one, or nested without reason."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise _nested(path, "checkpoint.bad_json") from error
    except (ValueError, OSError) as error:
        raise broken(path, f"is not readable JSON: {error}", "checkpoint.bad_json") from error
    if not isinstance(value, dict):
        raise broken(path, f"holds a {type(value).__name__}, not an object", "checkpoint.bad_json")
    if _deeper_than(value, MAX_DEPTH):
        raise _nested(path, "checkpoint.bad_json")
    return value


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file for tensors of these dtypes and shapes, and the file offset
    of each; the widest elements first, as the safetensors library orders them."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    at = 0
    for name in sorted(tensors, key=lambda n: (-DTYPE_BITS[tensors[n][0]], n)):
        dtype, shape = tensors[name]
        starts[name], end = at, at + prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in starts.items()}


def read_header(shard: Path) -> dict[str, TensorInfo]:
    """Parse and check one safetensors header.

    Raises InputError (`checkpoint.*`) for whatever the safetensors library refuses: a file that is
    cut short or longer than its tensors, keys that repeat, shapes and offsets that are no whole
    numbers, tensors that overlap or leave holes.
    """
    _require_file(shard)
    try:
        size = shard.stat().st_size
        with shard.open("rb") as handle:
            prefix = handle.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) < 8 or length > MAX_HEADER or 8 + length > size:
                raise broken(
                    shard,
                    f"is truncated or not safetensors ({size} bytes, header of {length})",
                    "checkpoint.truncated",
                )
            raw = handle.read(length)
    except OSError as error:
        raise broken(shard, f"cannot be read: {error}", "checkpoint.unreadable") from error
    header = _parse(shard, raw)
    _check_metadata(shard, header.pop("__metadata__", None))
    tensors = {name: tensor_entry(shard, name, entry, 8 + length) for name, entry in header.items()}
    check_tiling(shard, tensors.values(), 8 + length, size)
    return tensors


def check_tiling(shard: Path, tensors: Iterable[TensorInfo], begin: int, size: int | None) -> None:
    """InputError unless the tensors fill the file from `begin` to its `size` (None: not known)."""
    at, before = begin, "the header"
    for info in sorted(tensors, key=lambda info: (info.start, info.end)):
        if size is not None and info.end > size:
            raise broken(
                shard,
                f"is truncated: {info.name} ends at byte {info.end}, the file at {size}",
                "checkpoint.truncated",
            )
        if info.start != at:
            what = "overlaps" if info.start < at else f"leaves {info.start - at} unused bytes after"
            raise broken(
                shard,
                f"gives {info.name} the bytes {info.start} to {info.end}, which {what} {before} "
                f"(it ends at {at})",
                "checkpoint.bad_header",
            )
        at, before = info.end, info.name
    if size is not None and at != size:
        raise broken(
            shard,
            f"has {size} bytes, {size - at} more than its tensors, which end at {at}",
            "checkpoint.extra_bytes",
        )


def tensor_entry(shard: Path, name: str, entry: object, begin: int) -> TensorInfo:
    """One entry of a header, its offsets counted from `begin`; InputError where it is no tensor."""
    found = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _whole(shape) and _whole(offsets) and len(offsets) == 2):
        raise broken(shard, f"has a bad entry for {name}: {_short(entry)}", "checkpoint.bad_header")
    if dtype not in DTYPE_BITS:
        raise broken(shard, f"stores {name} as unknown {dtype}", "checkpoint.bad_header")
    start, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - start != bits // 8:
        raise broken(
            shard,
            f"gives {end - start} bytes to {name}, but {dtype}{list(shape)} needs {bits / 8:g}",
            "checkpoint.bad_header",
        )
    return TensorInfo(name, dtype, tuple(shape), shard, begin + start, begin + end)


def _require_file(shard: Path) -> None:
    if shard.is_file():
        return
    if shard.is_dir():
        what = "is a directory, not a safetensors file"
    elif shard.is_symlink():
        what = f"is a link to {shard.readlink()}, which does not exist"
    else:
        what = "does not exist or is no regular file"
    raise broken(shard, what, "checkpoint.missing_shard")


def _parse(shard: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"it names {twice!r} twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise _nested(shard, "checkpoint.bad_header") from error
    except ValueError as error:
        raise broken(
            shard, f"has an unreadable header: {error}", "checkpoint.bad_header"
        ) from error
    if not isinstance(header, dict):
        raise broken(
            shard, f"has a header that is {_short(header)}, not an object", "checkpoint.bad_header"
        )
    return header


def _check_metadata(shard: Path, metadata: object) -> None:
    pairs = {} if metadata is None else metadata
    if not isinstance(pairs, dict):
        what = f"has a __metadata__ that is {_short(pairs)}, not an object"
        raise broken(shard, what, "checkpoint.bad_header")
    for key, value in pairs.items():
        if not isinstance(value, str):
            what = f"has the value {_short(value)} for {key!r} in __metadata__, not a string"
            raise broken(shard, what, "checkpoint.bad_header")


def _whole(value: object) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers that a 64-bit machine can count."""
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 64 for n in value
    )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _nested(file: Path, code: str) -> InputError:
    return broken(file, f"nests lists or objects more than {MAX_DEPTH} deep", code)


def _deeper_than(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return True
