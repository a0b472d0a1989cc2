"""Sizes and times as people write them (standard library only)."""

from __future__ import annotations

import re

from quantkit.errors import InputError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(what: str, text: str) -> int:
    """Bytes of a size such as 5GB or 1.5GiB; InputError that names `what` otherwise."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise InputError(
            f"{what} {text!r} is no size.",
            hint=f"for example {what}=5GB" if not what.startswith("-") else f"{what} 5GB",
            code="request.size",
        )
    number, unit, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** _POWERS[unit.upper()])


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 7 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
