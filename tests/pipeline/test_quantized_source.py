"""Sources that are quantized themselves: what the copy in 16 bit holds, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit import verify
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.provenance import PROVENANCE
from quantkit.pipeline.quantized_source import as_subject, dequantized, planned
from quantkit.validation.preflight import open_candidate
from tests.formats.test_foreign import gpt_oss
from tests.streaming.test_sources import fp8_block_copy
from tests.support.cli import inside, said
from tests.support.helpers import edit_json

pytestmark = pytest.mark.broad


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed(small_model: Path, tmp_path: Path) -> Path:
    """The model as others publish W4A16: packed integers, no 16-bit original named."""
    out = tmp_path / "packed"
    code, *told = inside("quantize", small_model, "--method", "rtn_w4a16", "--out", out,
                         "--set", "group_size=64", "--device", "cpu")  # fmt: skip
    assert code == 0, told
    (out / PROVENANCE).unlink()
    return out


def copied(path: Path) -> dict[str, torch.Tensor]:
    subject = as_subject(open_checkpoint(path))
    assert subject is not None
    copy = open_checkpoint(dequantized(subject))
    tensors = {name: copy.tensor(name) for name in copy.tensors}
    shapes = {name: (info.dtype, info.shape) for name, info in copy.tensors.items()}
    foreseen = planned(subject).tensors
    assert shapes == {name: (info.dtype, info.shape) for name, info in foreseen.items()}
    assert "quantization_config" not in copy.config
    return tensors


def test_packed_integers_are_read_as_compressed_tensors_reads_them(
    packed: Path, cache: Path
) -> None:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    stored, found = load_file(packed / "model.safetensors"), copied(packed)
    names = [name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed")]
    assert names
    for name in names:
        shape = torch.Size(stored[f"{name}_shape"].tolist())
        codes = unpack_from_int32(stored[f"{name}_packed"], 4, shape)
        scale = stored[f"{name}_scale"].float().repeat_interleave(64, 1)
        assert torch.equal(found[name], (codes.float() * scale).bfloat16()), name
    norm = "model.norm.weight"
    assert torch.equal(found[norm], stored[norm])


def test_experts_of_gpt_oss_are_read_as_transformers_reads_them(
    tmp_path: Path, cache: Path
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = gpt_oss(tmp_path / "m")
    stored, found = load_file(path / "model.safetensors"), copied(path)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(found[name], theirs)
        assert torch.equal(found[f"{name}_bias"], stored[f"{name}_bias"])


def test_fp8_blocks_become_what_they_mean(small_model: Path, tmp_path: Path, cache: Path) -> None:
    fp8, bf16 = fp8_block_copy(small_model, tmp_path)
    meant = open_checkpoint(bf16)
    edit_json(fp8 / "config.json",
              lambda c: c["quantization_config"].update(activation_scheme="dynamic"))  # fmt: skip
    found = copied(fp8)
    assert found.keys() == meant.tensors.keys()
    assert all(torch.equal(tensor, meant.tensor(name)) for name, tensor in found.items())
    code, text = said("plan", fp8, "--method", "modelopt_fp8")
    assert code == 0, text
    assert "quantized itself (fp8" in " ".join(text.split())


def test_a_packed_source_is_quantized_and_is_its_own_baseline(
    packed: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, *told = inside("quantize", packed, "--method", "rtn_fp8_dynamic", "--out", out,
                         "--device", "cpu")  # fmt: skip
    assert code == 0, told
    made = json.loads((out / PROVENANCE).read_text())
    assert any("quantized itself (compressed-tensors pack-quantized" in n for n in made["notes"])
    assert verify(out, source=packed).ok
    baseline = open_candidate(out, str(packed)).baseline
    assert baseline.path.is_relative_to(cache)
    assert baseline.fingerprint() == made["source"]["fingerprint"]


def test_what_quantkit_made_has_an_original(packed: Path, tmp_path: Path, cache: Path) -> None:
    (packed / PROVENANCE).write_text("{}")
    code, _, message = inside("quantize", packed, "--method", "rtn_fp8_dynamic", "--out",
                              tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert code == 1
    assert "quantized already" in message
