"""Which ids end a text: one answer for the runtime, the served engines and the canary."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.checkpoint.network.config import stop_tokens


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, {}, []),
        (None, {"eos_token_id": 0}, [0]),
        ({}, {"eos_token_id": [2, 3]}, [2, 3]),
        ({"eos_token_id": 7}, {"eos_token_id": 2}, [7]),
        ({"eos_token_id": [0, None, 7]}, {"eos_token_id": 2}, [0, 7]),
        ({"eos_token_id": None}, {"eos_token_id": None}, []),
    ],
)
def test_generation_config_counts_before_config(
    generation: dict[str, Any] | None, config: dict[str, Any], wanted: list[int], tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path, config) == wanted


def test_nobody_else_has_an_answer() -> None:
    """The tokenizer's end of a document is one id; what `verify` holds against a source is none."""
    package = Path(quantkit.__file__).parent
    reading = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if not file.is_relative_to(package / "verification")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == "eos_token_id"
    }
    assert reading == {"checkpoint/network/config.py", "calibration/tokenizer.py"}
