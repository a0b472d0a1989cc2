"""Which layout a checkpoint has, whether it is quantized, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.formats import registry
from quantkit.formats.registry import detect, is_quantized
from tests.formats.test_declare import edited
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors

Artifact = Callable[[str], Path]


def test_detection_refuses_what_it_does_not_know(
    artifact: Artifact, small_model: Path, tmp_path: Path
) -> None:
    plain = open_checkpoint(small_model)
    assert is_quantized(plain) is None
    with pytest.raises(InputError) as caught:
        detect(plain)
    assert caught.value.code == "format.none"

    path = edited(
        artifact("gptqmodel/w4"), tmp_path / "unknown", lambda c: c.update(quant_method="hqq")
    )
    unknown = open_checkpoint(path)
    assert is_quantized(unknown) == "hqq gptq"
    with pytest.raises(InputError, match="'hqq'") as caught:
        detect(unknown)
    assert caught.value.code == "format.unknown"
    assert "compressed-tensors" in caught.value.hint

    both = copy_checkpoint(artifact("llmcompressor/w8a8"), tmp_path / "both")
    side = (artifact("modelopt/fp8_kv") / "hf_quant_config.json").read_text()
    (both / "hf_quant_config.json").write_text(side)
    with pytest.raises(InputError, match=r"contradict each other: .*modelopt") as caught:
        detect(open_checkpoint(both))
    assert caught.value.code == "format.contradiction"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("modelopt/fp8_kv", "modelopt FP8"),
        ("llmcompressor/w4a16", "compressed-tensors pack-quantized"),
        ("gptqmodel/w4", "gptq"),
        ("autoround/auto_awq", "auto-round"),
    ],
)
def test_quantized_sources_are_named_with_and_without_a_config(
    artifact: Artifact, tmp_path: Path, name: str, said: str
) -> None:
    found = is_quantized(open_checkpoint(artifact(name)))
    assert found is not None
    assert found.startswith(said)
    path = copy_checkpoint(artifact(name), tmp_path / "silent")
    edit_json(path / "config.json", lambda config: config.pop("quantization_config"))
    for document in ("hf_quant_config.json", "quantize_config.json"):
        (path / document).unlink(missing_ok=True)
    found = is_quantized(open_checkpoint(path))
    assert found is not None
    assert "model.layers.0" in found


def test_every_format_names_what_marks_a_layer() -> None:
    for layout in registry.FORMATS:
        assert not {"weight", "bias"} & layout.quant_suffixes()
    names = [layout.NAME for layout in registry.FORMATS]
    ours = ["modelopt", "compressed-tensors", "gptq", "awq", "auto-round", "ascend"]
    assert names == [*ours, "fp8", "mxfp4", "quark"]


def test_a_byte_mask_is_no_quantized_weight(small_model: Path, tmp_path: Path) -> None:
    """Old GPT-2 style files keep causal masks as bytes; FP8 weights without a word are refused."""
    path = copy_checkpoint(small_model, tmp_path / "copy")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    edit_tensors(path, lambda t: t.update({"model.layers.0.self_attn.bias": mask}))
    assert is_quantized(open_checkpoint(path)) is None
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(path, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    assert is_quantized(open_checkpoint(path)) == f"FP8 tensor {name}"
