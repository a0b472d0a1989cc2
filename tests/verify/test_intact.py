"""No false alarm: what the libraries write passes, however odd it looks, and so do odd sources."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.verification import VerifyReport, verify
from tests.support.damage import DOWN, patch
from tests.support.helpers import edit_json, edit_tensors
from tests.support.rtn import ascend_w4a8, fp8_blocks, fuse_experts, rtn, tiny_moe

LIBRARIES = {
    "modelopt": ("fp8_kv", "fp8_pc_pt", "fp8_pb_wo", "int8_sq", "int4_awq", "mxfp8"),
    "llmcompressor": ("fp8_dynamic", "w8a8", "w4a16", "w4a16_asym", "nvfp4", "mxfp4"),
    "gptqmodel": ("w4", "w4_act_order", "w8_v2"),
    "autoround": ("auto_gptq", "auto_awq", "gptqmodel", "mxfp4", "awq"),
}
NAMES = [f"{library}/{name}" for library, names in LIBRARIES.items() for name in names]


def errors(report: VerifyReport) -> list[str]:
    """Errors that are not about files which the library was never given."""
    return [f"{f.code}: {f.message}" for f in report.errors if f.code != "sidecar.missing"]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_library_wrote_passes(artifact: Callable[[str], Path], name: str) -> None:
    path, source = artifact(name), artifact(f"{name.partition('/')[0]}/source")
    report = verify(path, source)
    assert not errors(report)
    assert not errors(verify(path))
    assert len(report.layers) == report.modules_quantized > 0
    assert set(report.ledger) <= {"quantized", "kept", "folded", "added"}
    assert ("folded" in report.ledger) == (name == "modelopt/int4_awq")
    for layer in report.layers:
        assert layer.sqnr_db > layer.floor_db + 3


def test_smoothed_layers_are_compared_as_the_quantizer_saw_them(
    artifact: Callable[[str], Path],
) -> None:
    report = verify(artifact("modelopt/int8_sq"), artifact("modelopt/source"))
    assert min(layer.sqnr_db for layer in report.layers) > 24


@pytest.fixture(scope="module")
def fp8(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(small_model, tmp_path_factory.mktemp("intact") / "fp8", SCHEMES["fp8_dynamic"])


@pytest.fixture
def copy(fp8: Path, tmp_path: Path) -> Path:
    shutil.copytree(fp8, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_cast_of_kept_tensors_is_a_warning_that_says_so(copy: Path, small_model: Path) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "norm" in n]:
            tensors[name] = tensors[name].half()

    edit_tensors(copy, cast)
    report = verify(copy, small_model)
    assert report.ok
    assert report.ledger["cast"] == 7
    assert any("BF16 → F16" in f.message for f in report.findings if f.code == "ledger.cast")


def test_a_cast_that_also_changes_a_value_is_an_error(copy: Path, small_model: Path) -> None:
    edit_tensors(copy, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half() * 2}))
    assert "ledger.altered" in verify(copy, small_model).codes()


def test_a_tied_head_may_be_written_out(copy: Path, small_model: Path) -> None:
    edit_tensors(
        copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    report = verify(copy, small_model)
    assert report.ok
    assert report.ledger["tied"] == 1


def test_names_of_another_transformers_version(copy: Path, small_model: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = name.replace("model.", "model.language_model.", 1)
            tensors[new] = tensors.pop(name)

    edit_tensors(copy, rename)
    report = verify(copy, small_model)
    assert report.ok
    assert "ledger.renamed" in report.codes("info")
    assert len(report.layers) == 21


def test_a_config_spelled_by_transformers_4(copy: Path, small_model: Path) -> None:
    def respell(config: dict[str, object]) -> None:
        rope = config.pop("rope_parameters")
        assert isinstance(rope, dict)
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "use_cache": False}
        config["torch_dtype"] = config.pop("dtype")
        config.pop("attention_bias")

    edit_json(copy / "config.json", respell)
    assert verify(copy, small_model).ok


def test_a_dropped_setting_is_judged_by_the_default_of_the_model_class(
    copy: Path, small_model: Path
) -> None:
    edit_json(copy / "config.json", lambda config: config.pop("rms_norm_eps"))
    assert "config.removed" in verify(copy, small_model).codes()


def test_do_sample_of_the_generation_config_may_be_normalised(
    copy: Path, small_model: Path
) -> None:
    edit_json(copy / "generation_config.json", lambda c: c.update(do_sample=True))
    assert verify(copy, small_model).ok


def test_several_shards_with_an_index(copy: Path, small_model: Path) -> None:
    import json

    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert verify(copy, small_model).ok


def test_the_zeros_of_an_ascend_checkpoint_are_legal(small_model: Path, tmp_path: Path) -> None:
    out = ascend_w4a8(small_model, tmp_path / "out")
    report = verify(out, small_model)
    assert report.ok, report.errors
    assert report.format == "ascend"
    assert min(layer.sqnr_db for layer in report.layers) > 12
    patch(out, f"{DOWN}.scale_bias", lambda t: t + float("inf"))
    assert verify(out).codes() == {"scale.nonfinite"}
    patch(out, f"{DOWN}.scale_bias", torch.zeros_like)
    patch(out, f"{DOWN}.weight_scale", torch.zeros_like)
    assert verify(out).codes() == {"scale.zero"}


@pytest.mark.filterwarnings("ignore")
def test_fused_experts_of_the_source_are_found(tmp_path: Path) -> None:
    source = fuse_experts(tiny_moe(tmp_path / "moe"), tmp_path / "fused")
    report = verify(rtn(source, tmp_path / "out", SCHEMES["fp8_dynamic"]), source)
    assert report.ok, report.errors
    assert report.ledger["quantized"] == 12
    experts = [layer for layer in report.layers if ".experts." in layer.module]
    assert len(experts) == 24
    assert min(layer.sqnr_db for layer in experts) > 30


def test_a_source_in_fp8_blocks(small_model: Path, tmp_path: Path) -> None:
    source = fp8_blocks(small_model, tmp_path / "source")
    kept = "model.layers.0.self_attn.o_proj"
    out = rtn(source, tmp_path / "out", SCHEMES["w8a16"], keep=[kept])
    report = verify(out, source)
    assert report.ok, report.errors
    assert min(layer.sqnr_db for layer in report.layers) > 35
    edit_tensors(out, lambda t: t.update({f"{kept}.weight": t[f"{kept}.weight"] * 1.5}))
    assert "ledger.altered" in verify(out, source).codes()


def test_a_quantized_model_is_no_source(fp8: Path) -> None:
    with pytest.raises(InputError) as refused:
        verify(fp8, fp8)
    assert refused.value.code == "source.quantized"


def test_an_unquantized_model_is_no_checkpoint_to_verify(small_model: Path) -> None:
    assert verify(small_model).codes() == {"format.none"}


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        verify(tmp_path / "none")


def test_what_the_source_lacks_too_is_no_loss(
    copy: Path, small_model: Path, tmp_path: Path
) -> None:
    pruned = tmp_path / "pruned"
    shutil.copytree(small_model, pruned)
    lost = "model.layers.1.post_attention_layernorm.weight"
    for directory in (copy, pruned):
        edit_json(directory / "config.json", lambda c: c.update(num_nextn_predict_layers=1))
        edit_tensors(directory, lambda t: t.pop(lost))
    assert verify(copy).codes() == {"complete.no_mtp", "complete.missing_module"}
    assert verify(copy, pruned).ok
    assert "ledger.missing" in verify(copy, small_model).codes()
