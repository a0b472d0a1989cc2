"""Local data files as rows: JSON lines, JSON, CSV and Parquet; and which fields of them are text.

`guess_fields` chooses where nobody says (the shapes of conversations: `shapes.py`; fields that a
calibration names: `config.py`).

JSON lines are indexed and read one by one, so that a file of many gigabytes costs an index only;
of Parquet the wanted columns are held as Arrow holds them; the other formats are read whole.

`datasets` would read CSV and Parquet too, but guesses types (the text `007` becomes the number 7,
`NA` becomes nothing), writes a copy of the file into its cache, and does not say what is wrong.
"""

from __future__ import annotations

import csv
import itertools
import json
from abc import abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from quantkit.calibration.shapes import (
    CONTEXTS,
    READABLE,
    SYSTEMS,
    ShapeError,
    find_turns,
    read_messages,
    resembles_conversation,
)
from quantkit.errors import InputError
from quantkit.recipe.documents import parse_json

if TYPE_CHECKING:
    import pyarrow

INSTALL = "pip install 'quantkit[datasets]'"
MAX_CSV_FIELD = 1 << 30


class _MadeWhenAsked(Sequence[Any]):
    """Rows of which each is made when it is asked for, by `_row`; a slice is a list of them."""

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._row(index)

    @abstractmethod
    def _row(self, index: int) -> Any:
        """One row."""


class JsonLines(_MadeWhenAsked):
    """The objects of a JSON lines file, parsed when asked for; blank lines are not rows.

    `fields` are those that will be read: their text must be text that UTF-8 can hold.
    """

    def __init__(self, path: Path, fields: Sequence[str] = ()) -> None:
        self.path = path
        self.fields = fields
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

    def _row(self, index: int) -> Any:
        with self.path.open("rb") as handle:
            handle.seek(self._starts[index])
            line = handle.readline()
        try:
            row = parse_json(line)
            _check_text(row, self.fields)
        except ValueError as error:
            raise _unreadable(self.path, f"line {self._lines[index]}: {error}") from error
        return row


class TableRows(_MadeWhenAsked):
    """The rows of an Arrow table, made when asked for."""

    def __init__(self, table: pyarrow.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def _row(self, index: int) -> Any:
        (row,) = self._table.slice(range(len(self))[index], 1).to_pylist()
        return row


def read_rows(path: Path, fields: Sequence[str], more: Sequence[str] = ()) -> Sequence[Any]:
    """The rows of a data file; each is an object that has at least `fields`, and `more`, if the
    file does.

    Raises InputError for a file that cannot be read, has no rows, or whose first row lacks one
    of `fields` (the message names those it has).
    """
    rows: Sequence[Any]
    if path.suffix.lower() == ".parquet":
        rows = _read_parquet(path, fields, more)
    else:
        rows = _read_text_rows(path, (*fields, *more))
    if not rows:
        raise InputError(
            f"{path} has no rows.",
            hint="write at least one document into it, or leave it out of the calibration",
            code="calibration.empty_source",
        )
    if not isinstance(rows[0], Mapping):
        raise _unreadable(path, f"its first row is a {type(rows[0]).__name__}, not an object")
    check_fields(path.name, fields, list(rows[0]))
    return rows


def check_fields(where: str, fields: Sequence[str], present: Sequence[str]) -> None:
    """Raise InputError when rows lack a field that the calibration names."""
    for field in fields:
        if field not in present:
            raise InputError(
                f"{where} has no field {field!r}; its fields are {', '.join(present) or '(none)'}.",
                hint="set text_field, messages_field or turn_fields of the source to such",
                code="calibration.no_field",
            )


def guess_fields(path: Path) -> dict[str, str | list[str]]:
    """Keys of a source, with their values, for a data file that came without a calibration:
    `messages_field` or `turn_fields`, with `system_field` where there is such, or `text_field`.

    The field `messages` or `text`; the fields of a question and its answer; or the only field
    that holds a conversation or a text in the first row.
    """
    row = _first_row(path)
    systems = [name for name in SYSTEMS if name in row and isinstance(row[name], str | None)]
    said: dict[str, str | list[str]] = {"system_field": systems[0]} if systems else {}
    pair = find_turns(row)
    if pair and not {"messages", "text"} & row.keys():
        return {"turn_fields": pair, **said}
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
    if conversations:
        return {
            "messages_field": conversations[0] if len(conversations) == 1 else "messages",
            **said,
        }
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in texts or len(texts) == 1 or not row:
        return {"text_field": texts[0] if len(texts) == 1 else "text"}
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


def _first_row(path: Path) -> dict[str, Any]:
    """The first row, with a null for each context or system's message that only one of the next
    hundred has."""
    if path.suffix.lower() == ".parquet":
        rows: Sequence[Any] = _read_parquet(path, (), limit=1)
    else:
        rows = _read_text_rows(path)
    if not rows or not isinstance(rows[0], Mapping):
        return {}
    later = (row for row in rows[1:100] if isinstance(row, Mapping))
    named = {name for row in later for name in (*CONTEXTS, *SYSTEMS) if name in row}
    return {**rows[0], **{name: None for name in sorted(named) if name not in rows[0]}}


def _is_read(value: object) -> bool:
    try:
        read_messages(value)
    except ShapeError:
        return False
    return True


def _read_text_rows(path: Path, fields: Sequence[str] = ()) -> Sequence[Any]:
    try:
        if path.suffix.lower() == ".csv":
            return _read_csv(path)
        if path.suffix.lower() == ".json" and _first_byte(path) == b"[":
            rows = parse_json(path.read_text(encoding="utf-8-sig"))
            assert isinstance(rows, list)
            for number, row in enumerate(rows, 1):
                _check_text(row, fields, f"row {number}: ")
            return rows
    except (ValueError, OSError, csv.Error) as error:
        raise _unreadable(path, str(error)) from error
    return JsonLines(path, fields)


def _check_text(row: object, fields: Sequence[str], where: str = "") -> None:
    """ValueError where a field holds half a surrogate pair, which JSON can say and UTF-8 not."""
    if not isinstance(row, Mapping):
        return
    for field in fields:
        try:
            json.dumps(row.get(field), ensure_ascii=False).encode()
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


def _read_parquet(
    path: Path, fields: Sequence[str], more: Sequence[str] = (), limit: int | None = None
) -> TableRows:
    """Rows with the columns `fields`, and `more` where there are such; all where none is named."""
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
        check_fields(path.name, fields, names)
        wanted = {*fields, *more}
        columns = [name for name in names if name in wanted or not fields]
        if limit is None:
            return TableRows(file.read(columns=columns))
        first = itertools.islice(file.iter_batches(batch_size=limit, columns=columns), 1)
        schema = pyarrow.schema([file.schema_arrow.field(name) for name in columns])
        return TableRows(pyarrow.Table.from_batches(first, schema))
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be read as {path.suffix.lower().removeprefix('.')}: "
        f"{' '.join(why.split())}.",
        hint="repair the file, or leave it out of the calibration",
        code="calibration.unreadable_data",
    )
