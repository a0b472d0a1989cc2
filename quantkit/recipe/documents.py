"""YAML and JSON as people write them: what the parsers let through or die of is refused."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.errors import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError

Location = tuple[int | str, ...]
"""Where pydantic found a fault: keys and positions, from the outside in."""


class TooDeepError(ValueError):
    """A document that nests deeper than Python can follow."""

    def __init__(self) -> None:
        super().__init__("it nests too deeply")


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML document.

    Raises yaml.YAMLError or ValueError for what is none, for a key that a mapping holds twice, and
    (TooDeepError) for a document that nests too deeply.
    """
    try:
        return yaml.load(text, _UniqueKeys)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise TooDeepError from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document; ValueError for what is none or nests too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise TooDeepError from None


def read_yaml_object(file: Path, kind: str, hint: str) -> dict[str, Any]:
    """The keys and values of a YAML file; `kind` is what it is called ("recipe").

    Raises InputError (`KIND.unreadable`) for a file that cannot be read or holds something else.
    """
    code = f"{kind}.unreadable"
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"The {kind} {file} cannot be read: {said}", hint=hint, code=code
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"The {kind} {file} holds a {type(data).__name__}, not keys and values.",
            hint=hint,
            code=code,
        )
    return data


def explain(
    error: ValidationError,
    origin: str,
    locate: Callable[[Location], tuple[list[str], list[str]]],
    *,
    hint: str,
    code: str,
) -> InputError:
    """The first fault that pydantic found, with its key path and what is allowed there.

    `locate` gives the key path of a place and the keys that are allowed beside its last one.
    """
    first = error.errors()[0]
    keys, allowed = locate(first["loc"])
    path, value = ".".join(keys), first["input"]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = (
            f"{origin}: unknown key {path} = {value!r}.{meant(keys[-1], allowed)} "
            f"Allowed here: {', '.join(allowed) or 'nothing'}."
        )
    elif first["type"] == "missing":
        message = f"{origin}: the key {path} is missing."
    elif first["type"] == "union_tag_not_found":
        tag = first["ctx"]["discriminator"].strip("'")
        message = f"{origin}: {path}.{tag} is missing; it is one of {', '.join(allowed)}."
    elif isinstance(value, dict):
        message = f"{origin}: {path + ': ' if path else ''}{reason}."
    else:
        message = f"{origin}: {path} = {value!r}: {reason}."
    more = len(error.errors()) - 1
    return InputError(message + (f" ({more} more)" if more else ""), hint=hint, code=code)


def meant(word: str, known: Collection[str]) -> str:
    """ " Did you mean X?" where a known word is like this one."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


class _UniqueKeys(yaml.SafeLoader):
    """A key that stands twice in a mapping is an error; YAML would keep the last one, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, same = key.start_mark.line + 1, (key.tag, key.value)
            if same in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key.value} stands twice, in lines {lines[same]} and {line}",
                    None,
                )
            lines[same] = line
        return super().construct_mapping(node, deep)
