"""Conversations in the shapes of published data sets; never a text field beside one."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration.rows import guess_field
from quantkit.calibration.shapes import ShapeError, read_messages
from quantkit.errors import InputError

PLAIN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN]


@pytest.mark.parametrize("value", [PLAIN, SHAREGPT, PARTS])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_conversation_is_read_and_its_id_is_not(tmp_path: Path, value: Any, suffix: str) -> None:
    row = {"id": "0b7c", "conversations": value}
    file = tmp_path / f"chat.{suffix}"
    file.write_text(json.dumps([row] if suffix == "json" else row))
    assert guess_field(file) == ("messages_field", "conversations")
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
        guess_field(file)
    assert "{from, value}" in str(error.value.hint)


def test_a_text_beside_other_lists_is_read(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "words", "links": [{"url": "x"}]}))
    assert guess_field(file) == ("text_field", "text")
