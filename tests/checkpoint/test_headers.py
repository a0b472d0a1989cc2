"""Headers and configs that the safetensors library or an engine refuses are refused by name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantkit.checkpoint.directory import open_checkpoint, read_header
from quantkit.checkpoint.hub import open_for_plan
from quantkit.checkpoint.without_weights import open_headers
from quantkit.errors import InputError
from quantkit.verification import verify
from tests.support.cli import quantkit, refused
from tests.support.helpers import copy_checkpoint, edit_json

A: dict[str, Any] = {"dtype": "I8", "shape": [2, 2], "data_offsets": [0, 4]}
B: dict[str, Any] = {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}
TWICE = json.dumps({"a": A, "b": B, "c": B}).replace('"c"', '"a"')
DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"

REFUSED: dict[str, tuple[object, int, str]] = {
    # the header, bytes of data, what the message says
    "extra bytes": ({"a": A, "b": B}, 12, "4 more than its tensors"),
    "cut short": ({"a": A, "b": B}, 7, "b ends at byte"),
    "overlap": ({"a": A, "b": B | {"data_offsets": [0, 4]}}, 4, "overlaps"),
    "hole": ({"a": A, "b": B | {"data_offsets": [6, 10]}}, 10, "2 unused bytes after a"),
    "hole in front": ({"b": B}, 8, "unused bytes after the header"),
    "float shape": ({"a": A | {"shape": [2.0, 2.0]}, "b": B}, 8, "2.0"),
    "string shape": ({"a": A | {"shape": ["2", "2"]}, "b": B}, 8, '"2"'),
    "boolean shape": ({"a": A | {"shape": [4, True]}, "b": B}, 8, "true"),
    "string offset": ({"a": A | {"data_offsets": ["0", 4]}, "b": B}, 8, '"0"'),
    "metadata value": ({"__metadata__": {"step": 1}, "a": A, "b": B}, 8, "'step'"),
    "metadata list": ({"__metadata__": [], "a": A, "b": B}, 8, "__metadata__"),
    "same key twice": (TWICE, 8, "'a' twice"),
    "a list": ([], 0, "[]"),
    "a number": (5, 0, "5"),
    "null": (None, 0, "null"),
    "entry that is a list": ({"a": []}, 0, "a bad entry for a"),
    "deep nesting": (DEEP, 0, "nests"),
}


def shard(file: Path, header: object, size: int) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return file


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_library_refuses_is_refused_by_name(tmp_path: Path, case: str) -> None:
    header, size, telling = REFUSED[case]
    file = shard(tmp_path / "model.safetensors", header, size)
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert telling in caught.value.message
    assert file.name in caught.value.message


@pytest.mark.parametrize(
    "header",
    [
        {"a": A, "b": B},
        {"b": B, "a": A, "__metadata__": {"format": "mlx"}},
        {"a": A, "b": B, "nothing": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]}},
        {"a": A, "b": B, "end": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}},
    ],
)
def test_what_the_library_accepts_is_accepted(tmp_path: Path, header: dict[str, Any]) -> None:
    file = shard(tmp_path / "model.safetensors", header, 8)
    assert set(load_file(file)) == set(read_header(file))


def dangling(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "gone")


def directory(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()


def indexed(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        index(model)
        damage(model)

    return change


def index(model: Path, name: str = "model.safetensors.index.json") -> None:
    names = read_header(model / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors")
    (model / name).write_text(json.dumps({"weight_map": weight_map}))


def second_index(model: Path) -> None:
    index(model, "model.bf16.safetensors.index.json")
    index(model, "model.fp16.safetensors.index.json")


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda model: edit_json(model / "config.json", lambda c: c.update(changes))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "broken link": (dangling, ("model.safetensors", "gone")),
    "directory": (directory, ("model.safetensors", "is a directory")),
    "broken link in an index": (indexed(dangling), ("model.safetensors", "gone")),
    "directory in an index": (indexed(directory), ("model.safetensors", "is a directory")),
    "second index": (second_index, ("model.fp16.safetensors.index.json",)),
    "quantization_config": (config(quantization_config=5), ("quantization_config 5",)),
    "compression_config": (config(compression_config="x"), ("compression_config 'x'",)),
    "text_config": (config(text_config=5), ("text_config 5",)),
    "nested quantization_config": (
        config(text_config={"quantization_config": []}), ("text_config.quantization_config []",)),
    "architectures": (config(architectures=5), ("architectures 5",)),
    "one architecture": (config(architectures="Llama"), ("architectures 'Llama'",)),
    "layers": (config(num_hidden_layers=10**12), ("num_hidden_layers 1000000000000",)),
    "layers of GPT-2": (config(n_layer=10**12), ("n_layer 1000000000000",)),
    "experts": (config(num_experts=99_999), ("99999 experts",)),
    "deep config": (config(rope_scaling=nested(200)), ("config.json", "nests")),
    "config that is a list": (lambda m: (m / "config.json").write_text("[]"), ("list",)),
    "very deep config": (lambda m: (m / "config.json").write_text(DEEP), ("nests",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_by_every_reader(
    small_model: Path, tmp_path: Path, case: str
) -> None:
    damage, telling = BROKEN[case]
    model = copy_checkpoint(small_model, tmp_path / "model")
    damage(model)
    found = verify(model).findings
    assert all(part in found[0].message for part in telling)
    for reader in (open_checkpoint, open_headers, lambda path: open_for_plan(str(path))):
        with pytest.raises(InputError) as caught:
            reader(model)
        assert all(part in caught.value.message for part in telling)


def test_a_plan_of_a_header_that_is_no_object_is_an_error(
    small_model: Path, tmp_path: Path
) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    shard(model / "model.safetensors", [], 0)
    refused(quantkit("plan", model, "--method", "rtn_w8a16"), 1, "not an object")


@pytest.mark.parametrize("name", ["consolidated", "model.fp16"])
def test_another_copy_beside_the_usual_index_is_left_aside(
    small_model: Path, tmp_path: Path, name: str
) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    before = open_checkpoint(model).tensors.keys()
    index(model)
    index(model, f"{name}.safetensors.index.json")
    os.link(model / "model.safetensors", model / f"{name}.safetensors")
    assert open_checkpoint(model).tensors.keys() == before
