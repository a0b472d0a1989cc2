"""A recipe and a calibration are read, and refused, in the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.calibration.load import load_calibration
from quantkit.errors import InputError
from quantkit.recipe.load import read_recipe

READERS: dict[str, Callable[[str], object]] = {
    "recipe": read_recipe,
    "calibration": load_calibration,
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("a: [", "cannot be read: while parsing"),
        ("a: 1\na: 2", "cannot be read: the key a stands twice, in lines 1 and 2"),
        ("- a", "holds a list, not keys and values."),
        ("", "holds a NoneType, not keys and values."),
    ],
)
def test_what_holds_no_keys_is_refused(kind: str, text: str, telling: str, tmp_path: Path) -> None:
    file = tmp_path / "it.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        READERS[kind](str(file))
    assert caught.value.message.startswith(f"The {kind} {file} {telling}")
    assert caught.value.code == f"{kind}.unreadable"


WHOLE = {
    "recipe": "backend: modelopt\nscheme: fp8\n",
    "calibration": "samples: 1\nsequence_length: 8\n"
    "sources: [{type: file, path: x.txt, passage_chars: 200}]\n",
}


@pytest.mark.parametrize("kind", READERS)
def test_an_unknown_key_is_named_with_what_was_meant(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "it.yaml"
    file.write_text(WHOLE[kind] + "descriptoin: 3\n")
    with pytest.raises(InputError) as caught:
        READERS[kind](str(file))
    said = f"{file}: unknown key descriptoin = 3. Did you mean description? Allowed here: "
    assert caught.value.message.startswith(said)
    assert caught.value.code == f"{kind}.invalid"
