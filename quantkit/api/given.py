"""What the functions of the API are given: changes, lists, counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import InputError

Changes = Mapping[str, Any] | Iterable[str]
"""{"group_size": 64, "ignore+": ["re:.*o_proj"]}, or the texts that `--set` takes."""


def changes_of(given: Changes) -> list[str]:
    """The texts that `--set` takes."""
    from quantkit.recipe.load import as_changes

    if isinstance(given, Mapping):
        return as_changes(given)
    return [given] if isinstance(given, str) else list(given)


def listed(given: Any) -> list[Any]:
    """One value, or a sequence of them, as a list."""
    return [given] if isinstance(given, str | Path) else list(given)


def check_count(what: str, value: int | None, least: int = 1) -> None:
    """InputError where a count is less than the least that means something."""
    if value is not None and value < least:
        raise InputError(
            f"{what} {value} is less than {least}.",
            hint=f"for example {what} 8",
            code="request.count",
        )
