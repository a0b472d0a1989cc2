"""Tokenizer files beyond the source's that contradict the tokenizer they lie beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantkit.checkpoint.directory import read_json
from quantkit.errors import InputError
from quantkit.verification.findings import Finding, warning


def check_extras(directory: Path, extra: set[str], template: str | None) -> Iterator[Finding]:
    """Warnings on the files `extra` of a checkpoint; `template` is its chat template."""
    if "added_tokens.json" in extra:
        known = _tokens(_read(directory / "tokenizer.json"))
        for token, number in _read(directory / "added_tokens.json").items():
            if known and known.get(token) != number:
                yield _contradicts(
                    "added_tokens.json", f"{token!r} is {number!r}, in tokenizer.json "
                    f"{known.get(token, 'absent')}"
                )  # fmt: skip
                break
    if "special_tokens_map.json" in extra:
        config = _read(directory / "tokenizer_config.json")
        for key, token in _read(directory / "special_tokens_map.json").items():
            if key in config and _content(token) != _content(config[key]):
                yield _contradicts(
                    "special_tokens_map.json", f"{key} is {_content(token)!r}, in "
                    f"tokenizer_config.json {_content(config[key])!r}"
                )  # fmt: skip
    if "chat_template.json" in extra:
        other = _read(directory / "chat_template.json").get("chat_template")
        if isinstance(other, str) and other.strip() != template:
            yield _contradicts("chat_template.json", "it is another template than the tokenizer's")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where it is absent or cannot be read (reported elsewhere)."""
    try:
        return read_json(path) if path.is_file() else {}
    except InputError:
        return {}


def _tokens(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Token → id of a tokenizer.json; empty where its vocabulary is no mapping."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return {}
    added = tokenizer.get("added_tokens") or []
    return {**vocabulary, **{entry["content"]: entry["id"] for entry in added}}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _contradicts(name: str, what: str) -> Finding:
    return warning(
        "sidecar.contradicts",
        f"{name}, which the source lacks: {what}",
        f"remove {name}, or copy the tokenizer files of the source",
        name,
    )
