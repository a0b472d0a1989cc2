"""Settings of compressed-tensors that change what is computed are honoured or refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.formats.base import Declaration
from quantkit.formats.registry import detect
from tests.support.helpers import copy_checkpoint, edit_json

Artifact = Callable[[str], Path]
Config = dict[str, Any]
Change = Callable[[Config], object]

HADAMARD = {
    "config_groups": {
        "u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
    }
}


def declared(path: Path) -> Declaration:
    checkpoint = open_checkpoint(path)
    return detect(checkpoint).declare(checkpoint)


def group(**changes: Any) -> Change:
    return lambda c: c["config_groups"]["group_0"].update(changes)


def number(part: str, **changes: Any) -> Change:
    return lambda c: c["config_groups"]["group_0"][part].update(changes)


def twice(config: Config) -> None:
    second = copy.deepcopy(config["config_groups"]["group_0"])
    second["weights"]["strategy"] = "tensor"
    config["config_groups"]["group_1"] = second


W, A = "weights", "input_activations"
REFUSED: dict[str, tuple[Change, str, str]] = {
    # the change to a W8A8 configuration, the code, what the message says
    "transform": (lambda c: c.update(transform_config=HADAMARD), "unsupported", "hadamard"),
    "transform number": (lambda c: c.update(transform_config=5), "wrong_type", "config is 5"),
    "output": (group(output_activations={"num_bits": 4}), "unsupported", "output_activations"),
    "dynamic weights": (number(W, dynamic=True), "unsupported", "dynamic of the weights"),
    "input of 4 bits": (number(A, num_bits=4), "unsupported", "int 4 bit input_activations"),
    "input of floats": (number(A, type="float"), "unsupported", "float 8 bit input_activations"),
    "symmetric string": (number(W, symmetric="false"), "wrong_type", "symmetric of weights"),
    "symmetric input": (number(A, symmetric=1), "wrong_type", "symmetric of input_activations"),
    "bits string": (number(W, num_bits="8"), "wrong_type", "num_bits of weights"),
    "bits boolean": (number(W, num_bits=True), "wrong_type", "num_bits of weights"),
    "dynamic string": (number(A, dynamic="true"), "wrong_type", "dynamic of input_activations"),
    "group size string": (number(W, group_size="64"), "wrong_type", "group_size of weights"),
    "block": (number(W, block_structure="ax4"), "wrong_type", "block_structure of weights"),
    "weights list": (group(weights=[8]), "wrong_type", "weights of config group"),
    "ignore string": (lambda c: c.update(ignore="lm_head"), "wrong_type", "ignore is 'lm_head'"),
    "targets string": (group(targets="Linear"), "wrong_type", "targets of config group"),
    "sparsity": (lambda c: c.update(sparsity_config=5), "wrong_type", "sparsity_config is 5"),
    "same targets": (twice, "contradiction", "'group_0' and 'group_1' give 'Linear'"),
    "group format": (group(format="pack-quantized"), "contradiction", "'pack-quantized'"),
    "initialized": (
        lambda c: c.update(quantization_status="initialized"), "unsupported", "'initialized'"),
    "no method": (lambda c: c.pop("quant_method"), "no_method", "no quant_method"),
    "null method": (lambda c: c.update(quant_method=None), "no_method", "no quant_method"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_changes_the_meaning_is_refused(
    artifact: Artifact, tmp_path: Path, case: str
) -> None:
    change, code, told = REFUSED[case]
    path = copy_checkpoint(artifact("llmcompressor/w8a8"), tmp_path / "copy")
    edit_json(path / "config.json", lambda config: change(config["quantization_config"]))
    with pytest.raises(InputError) as caught:
        declared(path)
    assert caught.value.code == f"format.{code}"
    assert told in caught.value.message


ACCEPTED: dict[str, Change] = {
    "no transform": lambda c: c.update(transform_config=None),
    "transform without groups": lambda c: c.update(transform_config={"config_groups": {}}),
    "frozen": lambda c: c.update(quantization_status="frozen"),
    "no status": lambda c: c.pop("quantization_status"),
    "mixed": lambda c: c.update(format="mixed-precision"),
    "group without a format": group(format=None),
    "repeated group": lambda c: c["config_groups"].update(again=c["config_groups"]["group_0"]),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_means_the_same_is_accepted(artifact: Artifact, tmp_path: Path, case: str) -> None:
    source = artifact("llmcompressor/w8a8")
    path = copy_checkpoint(source, tmp_path / "copy")
    edit_json(path / "config.json", lambda c: ACCEPTED[case](c["quantization_config"]))
    assert declared(path).layers == declared(source).layers


@pytest.mark.parametrize(
    "name", ["fp8_dynamic", "mixed", "mxfp4", "nvfp4", "w4a16", "w4a16_asym", "w8a8"]
)
def test_every_real_export_is_accepted(artifact: Artifact, name: str) -> None:
    assert declared(artifact(f"llmcompressor/{name}")).layers


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_the_file_of_another_export_is_a_contradiction(
    artifact: Artifact, tmp_path: Path, file: str
) -> None:
    path = copy_checkpoint(artifact("llmcompressor/w8a8"), tmp_path / "copy")
    (path / file).write_text(json.dumps({"bits": 4, "group_size": 128}))
    with pytest.raises(InputError, match=file) as caught:
        declared(path)
    assert caught.value.code == "format.contradiction"


@pytest.mark.parametrize("nested", [False, True])
def test_a_second_configuration_must_say_the_same(
    artifact: Artifact, tmp_path: Path, nested: bool
) -> None:
    source = artifact("llmcompressor/w8a8")
    path = copy_checkpoint(source, tmp_path / "copy")

    def add(config: Config, **changes: Any) -> None:
        other = {**config["quantization_config"], **changes}
        key = "quantization_config" if nested else "compression_config"
        config.update({"text_config": {key: other}} if nested else {key: other})

    edit_json(path / "config.json", add)
    assert declared(path).layers == declared(source).layers
    edit_json(path / "config.json", lambda config: add(config, ignore=[]))
    with pytest.raises(InputError, match="different things") as caught:
        declared(path)
    assert caught.value.code == "format.contradiction"
