"""Shapes in which published data sets hold conversations, read as messages of a chat template.

{role, content} is the form of https://huggingface.co/docs/transformers/chat_templating, {from,
value} that of ShareGPT exports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

READABLE = (
    "a list of {role, content} or {from, value}, whose content is a text, text parts "
    "[{type: text, text}], or null beside tool_calls"
)
FORMS = (("role", "content"), ("from", "value"))
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
}


class ShapeError(ValueError):
    """A value is no conversation that can be read; the message says why."""


def resembles_conversation(value: object) -> bool:
    """Whether a value is meant as a conversation, readable or not: a list of turns."""
    turns = {"role", "from", "speaker", "content", "value", "user", "assistant"}
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(turn, Mapping) and bool(turns & turn.keys()) for turn in value)
    )


def read_messages(value: object) -> list[Message]:
    """A conversation's messages, each with a `role`, and a `content` that is a text or None.

    Raises ShapeError for another shape, and for parts that are not text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ShapeError(f"not {READABLE}")
    return [_message(turn) for turn in value]


def _message(turn: object) -> Message:
    for role, content in FORMS:
        if isinstance(turn, Mapping) and isinstance(turn.get(role), str):
            # Parquet fills the keys that a turn lacks with nulls.
            more = {
                str(k): v for k, v in turn.items() if k not in (role, content) and v is not None
            }
            text = _text(turn.get(content), bool(turn.get("tool_calls")))
            name = turn[role]
            name = SHAREGPT_ROLES.get(name, name) if role == "from" else name
            return {"role": name, "content": text, **more}
    raise ShapeError(f"not {READABLE}")


def _text(content: object, calls: bool) -> str | None:
    if isinstance(content, str) or (content is None and calls):
        return content
    if not isinstance(content, Sequence) or not content:
        raise ShapeError(f"not {READABLE}")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text":
            raise ShapeError(f"holds a part of type {kind}; only text parts are read")
        if not isinstance(part.get("text"), str):
            raise ShapeError(f"not {READABLE}")
        texts.append(part["text"])
    return "".join(texts)
