"""Configuration files of the wrong shape end in findings, never in a traceback."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.backends.streaming.job import Layout
from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.verification import verify
from tests.support.rtn import rtn, tiny_moe

INT4 = SCHEMES["w4a16"].with_weight(group_size=32)

JUNK: tuple[Any, ...] = (None, "x", [[1]], {"a": 1})


def changes(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The document with each setting of its quantization replaced by each kind of junk, or gone."""
    for path in list(paths(document.get("quantization_config", document))):
        for junk in JUNK:
            changed = copy.deepcopy(document)
            at: Any = changed.get("quantization_config", changed)
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = junk
            yield changed
        del at[path[-1]]
        yield changed


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside: dict[Any, Any] = {}
    if isinstance(value, dict):
        inside = value
    elif isinstance(value, list):
        inside = dict(enumerate(value[:2]))
    for key, item in inside.items():
        yield (*prefix, key)
        yield from paths(item, (*prefix, key))


def never_raises(intact: Path, broken: Path, *files: str) -> None:
    shutil.copytree(intact, broken)
    for file in files:
        text = (broken / file).read_text()
        for changed in list(changes(json.loads(text))):
            (broken / file).write_text(json.dumps(changed))
            for finding in verify(broken).findings:
                assert finding.message
        (broken / file).write_text(text)
    assert verify(broken).ok


def test_junk_in_the_files_of_modelopt(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    intact = artifact("modelopt/mxfp8")
    never_raises(intact, tmp_path / "broken", "config.json", "hf_quant_config.json")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        (SCHEMES["nvfp4a16"], "compressed-tensors"),
        (SCHEMES["fp8_block"], "compressed-tensors"),
        (INT4, "gptq"),
        (INT4.with_weight(symmetric=False), "awq"),
    ],
)
def test_junk_in_config(scheme: Scheme, layout: Layout, tmp_path: Path) -> None:
    intact = rtn(tiny_moe(tmp_path / "model"), tmp_path / "intact", scheme, layout=layout)
    never_raises(intact, tmp_path / "broken", "config.json")
