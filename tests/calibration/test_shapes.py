"""Conversations in the shapes of published data sets; never a text field beside one."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration.config import FileSource
from quantkit.calibration.documents import Document, Dropped, from_row
from quantkit.calibration.load import load_calibration
from quantkit.calibration.rows import guess_fields
from quantkit.calibration.shapes import ShapeError, read_messages
from quantkit.calibration.sources import open_source
from quantkit.errors import InputError
from tests.calibration.test_sources import write_parquet

PLAIN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN]


@pytest.mark.parametrize("value", [PLAIN, SHAREGPT, PARTS])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_conversation_is_read_and_its_id_is_not(tmp_path: Path, value: Any, suffix: str) -> None:
    row = {"id": "0b7c", "conversations": value}
    file = tmp_path / f"chat.{suffix}"
    file.write_text(json.dumps([row] if suffix == "json" else row))
    assert guess_fields(file) == {"messages_field": "conversations"}
    assert read_messages(value) == PLAIN


def test_tool_calls_have_null_content() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    assert read_messages([message]) == [message]
    with pytest.raises(ShapeError):
        read_messages([{"role": "assistant", "content": None}])


def test_other_parts_are_named() -> None:
    with pytest.raises(ShapeError, match="type image"):
        read_messages([{"role": "user", "content": [{"type": "image"}]}])


def test_an_unread_shape_is_refused_beside_a_text(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"id": "0b7c", "turns": [{"speaker": "a", "said": "b"}]}))
    with pytest.raises(InputError, match="turns, in a shape") as error:
        guess_fields(file)
    assert "{from, value}" in str(error.value.hint)


def test_a_text_beside_other_lists_is_read(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "words", "links": [{"url": "x"}]}))
    assert guess_fields(file) == {"text_field": "text"}


PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt, completion": ({"id": "7", "prompt": "hi", "completion": "yes"}, "hi"),
    "prompt, response": ({"prompt": "hi", "response": "yes"}, "hi"),
    "question, answer": ({"question": "hi", "answer": "yes", "level": "3"}, "hi"),
    "instruction, output": ({"instruction": "hi", "output": "yes"}, "hi"),
    "no input": ({"instruction": "hi", "input": "", "output": "yes"}, "hi"),
    "input": ({"instruction": "hi", "input": "you", "output": "yes"}, "hi\n\nyou"),
    "context": ({"context": "you", "instruction": "hi", "response": "yes"}, "hi\n\nyou"),
    "only input": ({"input": "hi", "output": "yes"}, "hi"),
    "messages": ({"prompt": PLAIN[:1], "completion": PLAIN[1:]}, "hi"),
    "messages and a text": ({"prompt": PLAIN[:1], "response": "yes"}, "hi"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_question_and_its_answer_are_two_turns(tmp_path: Path, kind: str, suffix: str) -> None:
    row, asked = PAIRS[kind]
    file = tmp_path / f"pairs.{suffix}"
    if suffix == "parquet":
        write_parquet(file, [row])
    else:
        file.write_text(json.dumps([row] if suffix == "json" else row))
    [source] = load_calibration(str(file)).sources
    assert isinstance(source, FileSource)
    [document] = open_source(source).read(0)
    assert isinstance(document, Document)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]
    assert document.content == turns


def test_an_input_that_only_later_rows_have_is_read(tmp_path: Path) -> None:
    rows = [{"instruction": "hi", "output": "yes"}, {**PAIRS["input"][0]}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [source] = load_calibration(str(file)).sources
    assert isinstance(source, FileSource)
    found = [d.content for d in open_source(source).read(0) if isinstance(d, Document)]
    asked = {content[0]["content"] for content in found if not isinstance(content, str)}
    assert asked == {"hi", "hi\n\nyou"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "question": "b", "answer": "c"},
        {"prompt": "a", "response": "b", "answer": "c"},
        {"title": "a", "body": "b"},
    ],
)
def test_texts_that_are_no_pair_are_not_guessed(tmp_path: Path, row: dict[str, str]) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(InputError, match="several fields that could be the text"):
        guess_fields(file)


def test_a_text_or_messages_beside_a_pair_are_read(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b", "text": "words"}))
    assert guess_fields(file) == {"text_field": "text"}
    file.write_text(json.dumps({"prompt": "a", "response": "b", "messages": PLAIN}))
    assert guess_fields(file) == {"messages_field": "messages"}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": "niv.1", "system_prompt": "Be brief.", "question": "hi", "response": "yes"}],
         True),
        ([{"system_prompt": "", "question": "hi", "response": "yes"}], False),
        ([{"instruction": "hi", "output": "yes"}, {"instruction": "hi", "output": "yes",
                                                   "system": "Be brief."}], True),
        ([{"id": "7", "system": "Be brief.", "conversations": SHAREGPT}], True),
        ([{"system": "Be long.", "messages": [SYSTEM, *PLAIN]}], True),
        ([{"system": None, "messages": PLAIN}], False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_the_system_says_comes_first(
    tmp_path: Path, rows: list[dict[str, Any]], said: bool, suffix: str
) -> None:
    file = tmp_path / f"chat.{suffix}"
    if suffix == "parquet":
        write_parquet(file, [{**dict.fromkeys(rows[-1]), **row} for row in rows])
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [source] = load_calibration(str(file)).sources
    assert isinstance(source, FileSource)
    found = [d.content for d in open_source(source).read(0) if isinstance(d, Document)]
    assert len(found) == len(rows)
    assert ([SYSTEM, *PLAIN] in found) == said
    assert (PLAIN in found) == (not said or len(rows) > 1)


def test_a_system_field_needs_a_conversation() -> None:
    with pytest.raises(ValueError, match="system_field"):
        FileSource(type="file", path="a.jsonl", text_field="text", system_field="system")


BLANK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " \n"}]


@pytest.mark.parametrize(
    ("fields", "row", "reason"),
    [
        ({"messages_field": "messages"}, {"messages": BLANK}, "messages is blank"),
        ({"messages_field": "messages"}, {"messages": PLAIN, "tools": 4}, "tools: neither"),
        ({"turn_fields": ["a", "b"]}, {"a": "hi", "b": " "}, "b is blank"),
        ({"turn_fields": ["a", "b"]}, {"a": "hi"}, "no b"),
        (
            {"turn_fields": ["a", "b"], "system_field": "c"},
            {"a": "hi", "b": "yes", "c": 4},
            "c: not a text",
        ),
        ({"turn_fields": ["a", "b", "c"]}, {"a": "hi", "b": 4, "c": "yes"}, "a, b, c: not a text"),
    ],
)
def test_what_is_dropped(fields: Any, row: dict[str, Any], reason: str) -> None:
    [found] = from_row(row, "row", FileSource(type="file", path="a.jsonl", **fields))
    assert isinstance(found, Dropped)
    assert found.reason.startswith(reason)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("given", "read"),
    [([TOOL], [TOOL]), (json.dumps([TOOL]), [TOOL]), ([{**TOOL, "x": None}], [TOOL]),
     (None, None), ([], None), ("", None)],
)  # fmt: skip
def test_tools_are_read(given: Any, read: Any) -> None:
    source = FileSource(type="file", path="a.jsonl", messages_field="messages")
    [found] = from_row({"messages": PLAIN, "tools": given}, "row", source)
    assert isinstance(found, Document)
    assert (found.content, found.tools) == (PLAIN, read)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tools_come_with_the_rows_of_a_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"chat.{suffix}"
    rows = [{"id": 1, "messages": PLAIN, "tools": [TOOL]}]
    if suffix == "parquet":
        write_parquet(file, rows)
    else:
        file.write_text(json.dumps(rows[0]))
    [source] = load_calibration(str(file)).sources
    [found] = open_source(source).read(0)
    assert isinstance(found, Document)
    assert found.tools == [TOOL]
