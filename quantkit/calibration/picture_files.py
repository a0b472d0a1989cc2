"""Pictures that rows of a data set name or hold, and the conversations that they belong to."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.calibration.shapes import Message, ShapeError

if TYPE_CHECKING:
    from quantkit.calibration.pictures import Pixels

READABLE = "a path beside the data file, bytes, or a list of such"


def pixels_of(value: object, folder: Path | None) -> tuple[Pixels, ...]:
    """The pictures of a field, uint8 [height, width, 3] each: a path below or beside `folder`,
    `{bytes}` as Parquet holds it, what `datasets` has decoded, or a list of these.

    Raises ShapeError for anything else, and for what is no picture.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    found = []
    for one in _each(value):
        source = one if isinstance(one, Image.Image) else _opened(one, folder)
        try:
            with source if isinstance(source, Image.Image) else Image.open(source) as image:
                found.append(np.asarray(image.convert("RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise ShapeError(f"no picture: {' '.join(str(error).split())}") from error
    return tuple(found)


def with_pictures(messages: Sequence[Message], count: int) -> list[Message]:
    """The messages with lists of parts for contents, and `count` pictures before the words of the
    first of the user's. Raises ShapeError for a conversation in which the user says nothing."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise ShapeError("no message of the user, to which pictures could belong")
    turns = [
        {**m, "content": [{"type": "text", "text": m["content"]}] if m["content"] else []}
        for m in messages
    ]
    turns[first]["content"] = [{"type": "image"}] * count + turns[first]["content"]
    return turns


def content_digest(rows: Sequence[Any], field: str, folder: Path) -> bytes:
    """A digest of the files that the field of the rows names, by their content."""
    total = hashlib.sha256()
    for row in rows:
        for one in _each(row.get(field) if isinstance(row, Mapping) else None):
            if isinstance(one, str) and (folder / one).is_file():
                with (folder / one).open("rb") as handle:
                    total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.digest()


def _each(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        yield from value
    elif value is not None:
        yield value


def _opened(value: object, folder: Path | None) -> Path | io.BytesIO:
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return io.BytesIO(value["bytes"])
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if not isinstance(value, str) or "://" in value or folder is None:
        raise ShapeError(f"not {READABLE}")
    return folder / value
