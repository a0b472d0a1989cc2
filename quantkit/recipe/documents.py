"""YAML and JSON as people write them: what the parsers let through or die of is refused."""

from __future__ import annotations

import json
from typing import Any

import yaml


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
