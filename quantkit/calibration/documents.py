"""What a source yields: documents in a seeded order, and those that cannot be used with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.calibration.config import FileSource, HubSource
from quantkit.calibration.picture_files import pixels_of, with_pictures
from quantkit.calibration.shapes import (
    Message,
    ShapeError,
    is_blank,
    read_messages,
    read_tools,
    read_turns,
    with_system,
)

if TYPE_CHECKING:
    from quantkit.calibration.pictures import Pixels


@dataclass(frozen=True)
class Document:
    """A text, or a conversation that the model's chat template will render with its tools.

    pictures: uint8 [height, width, 3] each, for the parts `{type: image}` of the conversation.
    """

    name: str
    content: str | list[Message]
    tools: list[Any] | None = None
    pictures: tuple[Pixels, ...] = ()

    @property
    def text(self) -> str:
        """What is said in it, a turn a line."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(_said(turn["content"]) for turn in self.content)


def _said(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


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


def from_row(
    row: Any, name: str, source: FileSource | HubSource, folder: Path | None = None
) -> Iterator[Document | Dropped]:
    """The documents of one row: its conversation, or its text in passages; `folder` is where the
    paths of its pictures begin."""
    if not isinstance(row, dict):
        yield Dropped(name, f"row is a {type(row).__name__}, not an object")
        return
    for field in source.fields:
        value = row.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            yield Dropped(name, f"no {field}" if value is None else f"{field} is blank")
            return
    field, value = source.fields[0], row[source.fields[0]]
    if source.messages_field or source.turn_fields:
        yield _conversation(row, name, source, folder)
    elif isinstance(value, str):
        for passage in passages(value, source.passage_chars):
            yield Document(name, passage)
    else:
        yield Dropped(name, f"{field} is not a text")


def _conversation(
    row: dict[str, Any], name: str, source: FileSource | HubSource, folder: Path | None
) -> Document | Dropped:
    field = ", ".join(source.turn_fields or source.fields)
    try:
        if source.turn_fields:
            *asked, answer = (row.get(name) for name in source.turn_fields)
            messages = read_turns(asked, answer)
        else:
            messages = read_messages(row[field])
    except ShapeError as error:
        return Dropped(name, f"{field}: {error}")
    try:
        if source.system_field:
            messages = with_system(messages, row.get(source.system_field))
    except ShapeError as error:
        return Dropped(name, f"{source.system_field}: {error}")
    if is_blank(messages):
        return Dropped(name, f"{field} is blank")
    try:
        tools = read_tools(row.get("tools"))
    except ShapeError as error:
        return Dropped(name, f"tools: {error}")
    pictures: tuple[Pixels, ...] = ()
    if source.image_field and row.get(source.image_field) is not None:
        try:
            pictures = pixels_of(row[source.image_field], folder)
            messages = with_pictures(messages, len(pictures))
        except ShapeError as error:
            return Dropped(name, f"{source.image_field}: {error}")
    return Document(name, messages, tools, pictures)


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
