"""Shapes in which published data sets hold conversations, read as messages of a chat template.

{role, content} is the form of https://huggingface.co/docs/transformers/chat_templating, {from,
value} that of ShareGPT exports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

READABLE = (
    "a list of {role, content} or {from, value}, whose content is a text, text parts "
    "[{type: text, text}], or null beside tool_calls"
)
FORMS = (("role", "content"), ("from", "value"))
QUESTIONS = ("instruction", "prompt", "question", "query")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "completion", "response", "answer")
"""Fields of rows with one turn each, as Alpaca, Dolly, GSM8K and the like name them."""
SYSTEMS = ("system_prompt", "system")
"""What OpenOrca and ShareGPT exports call the system's message beside the conversation."""
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


def find_turns(row: Mapping[str, Any]) -> list[str] | None:
    """The fields of a row that are one question (with its context) and its answer, in this order;
    None where it has no such pair, or more than one."""
    asked = [name for name in QUESTIONS if _is_turn(row.get(name))]
    answers = [name for name in ANSWERS if _is_turn(row.get(name))]
    context = [name for name in CONTEXTS if name in row]
    if len(asked) == 1 and len(answers) == 1 and len(context) <= 1:
        return [*asked, *context, *answers]
    if not asked and len(answers) == 1 and "input" in row and _is_turn(row["input"]):
        return ["input", *answers]
    return None


def _is_turn(value: object) -> bool:
    return isinstance(value, str) or resembles_conversation(value)


def read_turns(asked: Sequence[object], answer: object) -> list[Message]:
    """One turn of the user, its parts joined by blank lines, and one of the assistant.

    Either may be a list of messages already. Raises ShapeError for another shape.
    """
    first, *more = asked
    if not isinstance(first, str):
        question = read_messages(first)
    else:
        parts = [part for part in (first, *more) if part is not None]
        if not all(isinstance(part, str) for part in parts):
            raise ShapeError("not a text")
        text = "\n\n".join(str(part) for part in parts if str(part).strip())
        question = [{"role": "user", "content": text}]
    if isinstance(answer, str):
        return [*question, {"role": "assistant", "content": answer}]
    return [*question, *read_messages(answer)]


def with_system(messages: list[Message], value: object) -> list[Message]:
    """The messages after what the system says, where a row says it and they do not.

    Raises ShapeError for anything but a text or null.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return messages
    if not isinstance(value, str):
        raise ShapeError("not a text")
    if messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": value}, *messages]


def is_blank(messages: Sequence[Message]) -> bool:
    """Whether nothing is said in a conversation, whatever its system message is."""
    spoken = [m for m in messages if m["role"] not in ("system", "developer")] or messages
    return not any(
        (m["content"] or "").strip() or m.get("tool_calls") or m.get("reasoning_content")
        for m in spoken
    )


def read_tools(value: object) -> list[Any] | None:
    """The tools that a row offers to the assistant: a list of schemas, as such or as JSON.

    Raises ShapeError for anything else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ShapeError("neither a list of tools nor JSON of one") from error
    if value is None or value == "":
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ShapeError("neither a list of tools nor JSON of one")
    return [_without_nulls(tool) for tool in value] or None


def _without_nulls(value: Any) -> Any:
    """Without the nulls with which Parquet fills the keys that a schema lacks."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


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
