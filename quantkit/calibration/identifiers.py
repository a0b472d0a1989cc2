"""Text that no one wrote: UUIDs, digests, base64, `row-000123`. It shows a model no language."""

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
_NUMBERED = re.compile(
    r"(?=[A-Za-z]{2})(?:(?:[A-Za-z]+[-_./:#])+[0-9]+(?:[-_./:#](?=[A-Za-z])|$))+"
)
"""`sample_17`, `flan.564327`, `conv-12-turn-3`: names with a number after each."""
_ALONE = re.compile(r"(?=.*[0-9])(?:(?=.*[A-Za-z])[0-9A-Za-z_./:#+-]{2,64}={0,2}|[0-9]{5,64})")
"""A whole document in one word of letters and digits, or one long number: a key of some table."""
_AROUND = "\"'`[](){}<>,;"
MOSTLY = 0.8
"""The share of a text's characters above which it is identifiers; prose, code and tables of any
script have runs this long and this mixed in a few places at most."""


def is_identifiers(text: str) -> bool:
    """Whether a text is one word with a number in it, or nearly all of its characters, spaces
    apart, are UUIDs, hex digests, base64 or numbered names."""
    words = text.split()
    if len(words) == 1 and _ALONE.fullmatch(words[0]):
        return True
    rest = " ".join(word for word in words if not _NUMBERED.fullmatch(word.strip(_AROUND)))
    for pattern in (_UUID, _HEX):
        rest = pattern.sub("", rest)
    rest = _BASE64.sub(lambda run: "" if _random(run[0]) else run[0], rest)
    written = len("".join(words))
    return written > 0 and len("".join(rest.split())) <= (1 - MOSTLY) * written


def _random(run: str) -> bool:
    """Whether a long run of letters and digits is base64: of all three kinds, and no name."""
    kinds = [any(map(kind, run)) for kind in (str.isdigit, str.isupper, str.islower)]
    return all(kinds) and 2 * sum(map(len, _NAMED.findall(run))) < len(run)
