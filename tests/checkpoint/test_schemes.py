"""How a scheme is called in sentences for people."""

from __future__ import annotations

import pytest

from quantkit.checkpoint.schemes import SCHEMES, Scheme, described

W4 = SCHEMES["w4a16"]


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (None, "16 bit"),
        (SCHEMES["fp8"], "fp8"),
        (W4, "w4a16 (group 128)"),
        (W4.with_weight(group_size=64, symmetric=False), "w4a16 (group 64, asymmetric)"),
        (SCHEMES["w8a16"].with_weight(symmetric=False), "w8a16 (asymmetric)"),
    ],
)
def test_a_scheme_is_described_with_what_differs(scheme: Scheme | None, words: str) -> None:
    assert described(scheme) == words
