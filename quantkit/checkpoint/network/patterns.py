"""Name patterns of recipes: exact names, globs and `re:` expressions."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from quantkit.errors import InputError


def matches(name: str, pattern: str) -> bool:
    """Whether an ignore or override entry names a module.

    `re:` entries are regular expressions matched from the start (compressed-tensors' rule); others
    are exact names, or globs when they hold a wildcard.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or (any(c in pattern for c in "*?[") and fnmatchcase(name, pattern))


def pattern_fault(entry: str) -> str | None:
    """Why a `re:` entry is no regular expression, None for one that is and for any other entry."""
    if not entry.startswith("re:"):
        return None
    return regex_fault(entry.removeprefix("re:"))


def regex_fault(text: str) -> str | None:
    """Why a text is no regular expression, None for one that is."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error) or "it nests too deeply"
    return None


def compiled(text: str, entry: str) -> re.Pattern[str]:
    """The regular expression that an entry of a checkpoint's configuration holds."""
    if fault := regex_fault(text):
        raise InputError(
            f"The quantization configuration holds the pattern {entry!r}, which is no regular "
            f"expression: {fault}.",
            hint="correct the pattern in quantization_config, as in its ignore or targets",
            code="format.pattern",
        )
    return re.compile(text)
