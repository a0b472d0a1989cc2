"""What a source yields: documents in a seeded order, and those that cannot be used with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.calibration.config import FileSource, HubSource
from quantkit.calibration.shapes import Message, ShapeError, read_messages


@dataclass(frozen=True)
class Document:
    """A text, or a conversation that the model's chat template will render."""

    name: str
    content: str | list[Message]


@dataclass(frozen=True)
class Dropped:
    """A document that cannot be a sample."""

    name: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """An opened source: `digest` identifies its content, `read(seed)` yields it shuffled.

    `digest` is a SHA-256 over file contents, or the commit of a data set on the hub.
    """

    digest: str
    read: Callable[[int], Iterator[Document | Dropped]]


def shuffled(count: int, seed: int) -> Iterator[int]:
    """0 … count - 1 in the order of this seed, the same with every version of numpy.

    NumPy keeps the raw stream of a bit generator, unlike what is drawn from it (NEP 19).
    """
    import numpy as np

    keys = np.random.PCG64(seed).random_raw(count)
    return (int(index) for index in np.argsort(keys, kind="stable"))


def from_row(row: Any, name: str, source: FileSource | HubSource) -> Iterator[Document | Dropped]:
    """The documents of one row: its conversation, or its text in passages."""
    value = row.get(source.field) if isinstance(row, dict) else None
    if not isinstance(row, dict):
        yield Dropped(name, f"row is a {type(row).__name__}, not an object")
    elif value is None:
        yield Dropped(name, f"no {source.field}")
    elif isinstance(value, str) and not value.strip():
        yield Dropped(name, f"{source.field} is blank")
    elif source.messages_field is None and isinstance(value, str):
        for passage in passages(value, source.passage_chars):
            yield Document(name, passage)
    elif source.messages_field is None:
        yield Dropped(name, f"{source.field} is not a text")
    else:
        try:
            yield Document(name, read_messages(value))
        except ShapeError as error:
            yield Dropped(name, f"{source.field}: {error}")


def passages(text: str, size: int | None) -> Sequence[str]:
    """A text cut into about equal parts of at most `size` characters (None: not cut).

    Cuts fall after a line, else after a word, within the last third of a part; the parts joined
    are the text.
    """
    if size is None or len(text) <= size:
        return [text]
    parts: list[str] = []
    start = 0
    while start < len(text):
        left = len(text) - start
        end = start + -(-left // -(-left // size))
        if end < len(text):
            earliest = end - (end - start) // 3
            cut = text.rfind("\n", earliest, end)
            if cut < 0:
                cut = text.rfind(" ", earliest, end)
            end = cut + 1 if cut >= 0 else end
        parts.append(text[start:end])
        start = end
    return parts
