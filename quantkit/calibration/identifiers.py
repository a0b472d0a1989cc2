"""Text that no one wrote: UUIDs, digests, base64. A model calibrated on it sees no language."""

from __future__ import annotations

import re

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_HEX = re.compile(
    r"(?<![0-9A-Za-z])(?=[a-fA-F]*[0-9])(?=[0-9]*[a-fA-F])[0-9a-fA-F]{16,}(?![0-9A-Za-z])"
)
_BASE64 = re.compile(r"(?<![0-9A-Za-z+/_-])[0-9A-Za-z+/_-]{24,}={0,2}")
_NAMED = re.compile(
    r"[AEIOU][a-z]{2,}|[A-Z]?(?=[a-z]*[aeiou])[a-z]{3,}|[A-Z](?=[a-z]*[aeiou])[a-z]{2}"
    r"|[A-Z]{4,}|[0-9]{4,}|[-_/]"
)
"""What names and paths are made of: words (with a vowel), acronyms, numbers and what stands
between them. In base64 of random bytes such pieces cover a fifth of the characters, in names of
classes, models and files mostly more than a half."""
MOSTLY = 0.8
"""The share of a text's characters above which it is identifiers; prose, code and tables of any
script have runs this long and this mixed in a few places at most."""


def is_identifiers(text: str) -> bool:
    """Whether nearly all characters of a text, spaces apart, are UUIDs, hex digests or base64."""
    rest = text
    for pattern in (_UUID, _HEX):
        rest = pattern.sub("", rest)
    rest = _BASE64.sub(lambda run: "" if _random(run[0]) else run[0], rest)
    written = len("".join(text.split()))
    return written > 0 and len("".join(rest.split())) <= (1 - MOSTLY) * written


def _random(run: str) -> bool:
    """Whether a long run of letters and digits is base64: of all three kinds, and no name."""
    kinds = [any(map(kind, run)) for kind in (str.isdigit, str.isupper, str.islower)]
    return all(kinds) and 2 * sum(map(len, _NAMED.findall(run))) < len(run)
