"""Local data files as rows: JSON lines, JSON, CSV and Parquet.

JSON lines are indexed and read one by one, so that a file of many gigabytes costs an index only;
the other formats are read whole (of Parquet the wanted column).
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from quantkit.calibration.shapes import (
    READABLE,
    ShapeError,
    read_messages,
    resembles_conversation,
)
from quantkit.errors import InputError
from quantkit.recipe.documents import parse_json

INSTALL = "pip install 'quantkit[datasets]'"
MAX_CSV_FIELD = 1 << 30


class JsonLines(Sequence[Any]):
    """The objects of a JSON lines file, parsed when asked for; blank lines are not rows.

    `field` is the one whose text will be read: it must be text that UTF-8 can hold.
    """

    def __init__(self, path: Path, field: str | None = None) -> None:
        self.path = path
        self.field = field
        self._starts = array("Q")
        self._lines = array("Q")
        start = 0
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as handle:
            handle.seek(self._starts[index])
            line = handle.readline()
        try:
            row = parse_json(line)
            _check_text(row, self.field)
        except ValueError as error:
            raise _unreadable(self.path, f"line {self._lines[index]}: {error}") from error
        return row


def read_rows(path: Path, field: str) -> Sequence[Any]:
    """The rows of a data file; each is an object that has at least `field`, if the file does.

    Raises InputError for a file that cannot be read, has no rows, or whose first row has no
    `field` (the message names those it has).
    """
    rows: Sequence[Any]
    if path.suffix.lower() == ".parquet":
        rows = _read_parquet(path, field)
    else:
        rows = _read_text_rows(path, field)
    if not rows:
        raise InputError(
            f"{path} has no rows.",
            hint="write at least one document into it, or leave it out of the calibration",
            code="calibration.empty_source",
        )
    if not isinstance(rows[0], Mapping):
        raise _unreadable(path, f"its first row is a {type(rows[0]).__name__}, not an object")
    check_field(path.name, field, list(rows[0]))
    return rows


def check_field(where: str, field: str, fields: Sequence[str]) -> None:
    """Raise InputError when rows lack the field that the calibration names."""
    if field not in fields:
        raise InputError(
            f"{where} has no field {field!r}; its fields are {', '.join(fields) or '(none)'}.",
            hint="set text_field or messages_field of the source to one of them",
            code="calibration.no_field",
        )


def guess_field(path: Path) -> tuple[str, str]:
    """`("messages_field" | "text_field", name)` for a data file that came without a calibration.

    The field `messages` or `text`, or the only one that holds such values in the first row.
    """
    if path.suffix.lower() == ".parquet":
        rows: Sequence[Any] = _read_parquet(path, None, limit=1)
    else:
        rows = _read_text_rows(path)
    row = rows[0] if rows and isinstance(rows[0], Mapping) else {}
    turns = [name for name, value in row.items() if resembles_conversation(value)]
    conversations = [name for name in turns if _is_read(row[name])]
    if turns and not conversations:
        raise InputError(
            f"{path.name} holds conversations in {', '.join(turns)}, in a shape that is not read.",
            hint=f"write them as {READABLE}; or name a text_field in a calibration file: "
            "quantkit calibration show default  # an example",
            code="calibration.unread_shape",
        )
    if len(conversations) > 1 and "messages" not in conversations:
        raise InputError(
            f"{path.name} has several fields that hold conversations: {', '.join(conversations)}.",
            hint="write a calibration file with this source and its messages_field: "
            "quantkit calibration show default  # an example",
            code="calibration.no_field",
        )
    texts = [name for name, value in row.items() if isinstance(value, str)]
    for kind, named, usual in (
        ("messages_field", conversations, "messages"),
        ("text_field", texts, "text"),
    ):
        if usual in named or len(named) == 1:
            return kind, usual if usual in named else named[0]
    if not row:
        return "text_field", "text"
    found = (
        f"several fields that could be the text: {', '.join(texts)}"
        if texts
        else f"no field that holds a text or a conversation; its fields are {', '.join(row)}"
    )
    raise InputError(
        f"{path.name} has {found}.",
        hint="write a calibration file with this source and its text_field: "
        "quantkit calibration show default  # an example",
        code="calibration.no_field",
    )


def _is_read(value: object) -> bool:
    try:
        read_messages(value)
    except ShapeError:
        return False
    return True


def _read_text_rows(path: Path, field: str | None = None) -> Sequence[Any]:
    try:
        if path.suffix.lower() == ".csv":
            return _read_csv(path)
        if path.suffix.lower() == ".json" and _first_byte(path) == b"[":
            rows = parse_json(path.read_text(encoding="utf-8-sig"))
            assert isinstance(rows, list)
            for number, row in enumerate(rows, 1):
                _check_text(row, field, f"row {number}: ")
            return rows
    except (ValueError, OSError, csv.Error) as error:
        raise _unreadable(path, str(error)) from error
    return JsonLines(path, field)


def _check_text(row: object, field: str | None, where: str = "") -> None:
    """ValueError where the field holds half a surrogate pair, which JSON can say and UTF-8 not."""
    value = row.get(field) if field is not None and isinstance(row, Mapping) else None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{where}{field} holds {half}, half of a surrogate pair") from error


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    before = csv.field_size_limit(MAX_CSV_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            return list(csv.DictReader(handle, strict=True))
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, field: str | None, limit: int | None = None) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"Reading {path.name} needs pyarrow, which is not installed.",
            hint=INSTALL,
            code="calibration.needs_pyarrow",
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field is not None:
            check_field(path.name, field, names)
        columns = names if field is None else [field]
        if limit is None:
            return list(file.read(columns=columns).to_pylist())
        first = next(file.iter_batches(batch_size=limit, columns=columns), None)
        return list(first.to_pylist()) if first is not None else []
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be read as {path.suffix.lower().removeprefix('.')}: "
        f"{' '.join(why.split())}.",
        hint="repair the file, or leave it out of the calibration",
        code="calibration.unreadable_data",
    )
