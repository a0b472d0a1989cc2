"""Text that no one wrote: UUIDs, digests, base64. A model calibrated on it sees no language."""

from __future__ import annotations

import re

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_HEX = re.compile(
    r"(?<![0-9A-Za-z])(?=[a-fA-F]*[0-9])(?=[0-9]*[a-fA-F])[0-9a-fA-F]{16,}(?![0-9A-Za-z])"
)
_BASE64 = re.compile(
    r"(?<![0-9A-Za-z+/_-])(?=[^\s0-9]*[0-9])(?=[^\sA-Z]*[A-Z])(?=[^\sa-z]*[a-z])"
    r"[0-9A-Za-z+/_-]{24,}={0,2}"
)
MOSTLY = 0.8
"""The share of a text's characters above which it is identifiers; prose, code and tables of any
script have runs this long and this mixed in a few places at most."""


def is_identifiers(text: str) -> bool:
    """Whether nearly all characters of a text, spaces apart, are UUIDs, hex digests or base64."""
    rest = text
    for pattern in (_UUID, _HEX, _BASE64):
        rest = pattern.sub("", rest)
    written = len("".join(text.split()))
    return written > 0 and len("".join(rest.split())) <= (1 - MOSTLY) * written
