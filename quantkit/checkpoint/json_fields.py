"""Fields of an untrusted JSON object, each with its type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.errors import InputError


@dataclass(frozen=True)
class Fields:
    """An object of `file`, whose fields are taken by name and type.

    A value of another type raises InputError with its name, `hint` and `code`.
    """

    file: Path
    values: Mapping[str, Any]
    hint: str
    code: str
    prefix: str = ""

    def of(self, values: Mapping[str, Any], prefix: str) -> Fields:
        """Those of another object of the same file."""
        return replace(self, values=values, prefix=prefix)

    def take(self, key: str, kinds: type | tuple[type, ...], wanted: str) -> Any:
        """A field's value; None where it is absent or null."""
        value = self.values.get(key)
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if value is not None and (
            not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)
        ):
            raise self.wrong(key, value, wanted)
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self.take(key, str, "a text")
        return value

    def whole(self, key: str) -> int | None:
        value: int | None = self.take(key, int, "a whole number")
        return value

    def number(self, key: str) -> float | None:
        value: float | None = self.take(key, (int, float), "a number")
        return value

    def table(self, key: str) -> dict[str, Any] | None:
        value: dict[str, Any] | None = self.take(key, dict, "an object")
        return value

    def inside(self, key: str) -> Fields | None:
        """The fields of the object that a field holds."""
        values = self.table(key)
        return None if values is None else self.of(values, f"{self.prefix}{key}.")

    def every(self, key: str, kind: type, wanted: str) -> list[Any]:
        """The entries of a list, all of one type; none where it is absent."""
        found = self.take(key, list, wanted) or []
        if not all(isinstance(entry, kind) for entry in found):
            raise self.wrong(key, found, wanted)
        return list(found)

    def texts(self, key: str, wanted: str) -> dict[str, str] | None:
        """An object whose values are texts."""
        found = self.table(key)
        if found and not all(isinstance(value, str) for value in found.values()):
            raise self.wrong(key, found, wanted)
        return found

    def wrong(self, key: str, value: Any, wanted: str) -> InputError:
        return InputError(
            f"{self.file} is malformed: {self.prefix}{key} is {str(value)[:60]!r}, not {wanted}.",
            hint=self.hint,
            code=self.code,
        )
