"""What configurations say, on edited copies of real checkpoints; detection and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.errors import InputError
from quantkit.formats import compressed_tensors, gptq, inventory, modelopt
from quantkit.formats.base import Declaration
from quantkit.formats.dequantize import dequantize
from quantkit.formats.registry import detect
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors, tensor_name

Artifact = Callable[[str], Path]
Config = dict[str, Any]

K_PROJ = "model.layers.1.self_attn.k_proj"


def declared(path: Path) -> Declaration:
    checkpoint = open_checkpoint(path)
    return detect(checkpoint).declare(checkpoint)


def edited(source: Path, target: Path, change: Callable[[Config], object]) -> Path:
    """A copy whose `quantization_config` went through `change`."""
    copy_checkpoint(source, target)
    edit_json(target / "config.json", lambda config: change(config["quantization_config"]))
    return target


def codes(declaration: Declaration) -> list[str]:
    return [problem.code for problem in declaration.problems]


def test_modelopt_with_only_its_side_file(artifact: Artifact, tmp_path: Path) -> None:
    """Exports of ModelOpt before 0.29 leave config.json untouched."""
    source = artifact("modelopt/int4_awq")
    path = copy_checkpoint(source, tmp_path / "old")
    edit_json(path / "config.json", lambda config: config.pop("quantization_config"))
    assert declared(path).layers == declared(source).layers


def test_modelopt_with_only_config_json(artifact: Artifact, tmp_path: Path) -> None:
    """config.json says neither the group size of int4 nor the block of FP8_PB_WO: the scales do."""
    for name in ("int4_awq", "fp8_pb_wo", "mixed", "fp8_kv"):
        source = artifact(f"modelopt/{name}")
        path = copy_checkpoint(source, tmp_path / name)
        (path / "hf_quant_config.json").unlink()
        alone = declared(path)
        assert alone.layers == declared(source).layers
        assert alone.kv_cache == declared(source).kv_cache


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["quantization"].update(quant_algo="NVFP4"),
        lambda c: c["quantization"].update(kv_cache_quant_algo=None),
        lambda c: c["quantization"]["exclude_modules"].append("model.layers.0*"),
    ],
)
def test_modelopt_files_that_disagree(
    artifact: Artifact, tmp_path: Path, change: Callable[[Config], object]
) -> None:
    path = copy_checkpoint(artifact("modelopt/fp8_kv"), tmp_path / "copy")
    edit_json(path / "hf_quant_config.json", change)
    assert codes(declared(path)) == ["format.contradiction"]


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("model.layers.1.self_attn*", 4),
        ("model.layers.1.self_attn", 4),
        ("*self_attn.k_proj", 3),
        ("model.layers.[01].mlp.down_proj", 2),
        ("self_attn.k_proj", 3),
        ("k_pro", 0),
        ("model.layers.1.self_attn.k", 0),
    ],
)
def test_modelopt_exclude_patterns(
    artifact: Artifact, tmp_path: Path, entry: str, kept: int
) -> None:
    source = artifact("modelopt/fp8_kv")
    path = edited(source, tmp_path / "copy", lambda c: c["ignore"].append(entry))
    side = path / "hf_quant_config.json"
    edit_json(side, lambda c: c["quantization"]["exclude_modules"].append(entry))
    declaration = declared(path)
    assert list(declaration.ignored.values()).count(entry) == kept
    assert len(declaration.layers) == 21 - kept
    assert declaration.unmatched == (() if kept else (entry,))
    assert not declaration.problems


def test_modelopt_mixed_names_an_absent_layer(artifact: Artifact, tmp_path: Path) -> None:
    absent = {"model.layers.9.mlp.up_proj": {"quant_algo": "FP8"}}
    path = edited(
        artifact("modelopt/mixed"),
        tmp_path / "copy",
        lambda c: c["quantized_layers"].update(absent),
    )
    edit_json(
        path / "hf_quant_config.json",
        lambda c: c["quantization"]["quantized_layers"].update(absent),
    )
    declaration = declared(path)
    assert codes(declaration) == ["format.layer_missing"]
    assert "model.layers.9.mlp.up_proj" in declaration.problems[0].message


def test_modelopt_unknown_algorithm(artifact: Artifact, tmp_path: Path) -> None:
    path = edited(
        artifact("modelopt/fp8_kv"), tmp_path / "copy", lambda c: c.update(quant_algo="W3A3")
    )
    with pytest.raises(InputError, match="W3A3") as caught:
        declared(path)
    assert "NVFP4_AWQ" in caught.value.hint


def test_a_tied_head_in_an_ignore_list_is_matched(artifact: Artifact, tmp_path: Path) -> None:
    source = artifact("llmcompressor/w4a16")
    assert (
        "lm_head"
        in json.loads((source / "config.json").read_text())["quantization_config"]["ignore"]
    )
    assert not declared(source).unmatched
    path = copy_checkpoint(source, tmp_path / "untied")
    edit_json(path / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert declared(path).unmatched == ("lm_head",)


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("re:.*k_proj", 3),
        ("re:.*layers[.]0[.]", 7),
        ("re:k_proj", 0),
        (K_PROJ, 1),
        ("*k_proj", 0),
        ("model.layers.1.self_attn", 0),
    ],
)
def test_compressed_tensors_ignore_patterns(
    artifact: Artifact, tmp_path: Path, entry: str, kept: int
) -> None:
    """Its rule: a name, or `re:` matched from the start; no wildcards and no parents."""
    source = artifact("llmcompressor/w8a8")
    declaration = declared(edited(source, tmp_path / "copy", lambda c: c["ignore"].append(entry)))
    assert list(declaration.ignored.values()).count(entry) == kept
    assert len(declaration.layers) == 18 - kept
    assert declaration.unmatched == (() if kept else (entry,))


def test_compressed_tensors_prefers_the_more_specific_target(
    artifact: Artifact, tmp_path: Path
) -> None:
    def change(config: Config) -> None:
        groups = config["config_groups"]
        special = json.loads(json.dumps(groups["group_0"]))
        special["weights"]["num_bits"] = 8
        groups["group_1"] = {**special, "targets": [K_PROJ, "re:.*q_proj"]}

    layers = declared(edited(artifact("llmcompressor/w8a8"), tmp_path / "copy", change)).layers
    assert len(layers) == 18

    def narrow(config: Config) -> None:
        config["config_groups"]["group_0"]["targets"] = ["re:.*q_proj", K_PROJ, "model.absent.x"]

    declaration = declared(edited(artifact("llmcompressor/w8a8"), tmp_path / "narrow", narrow))
    assert set(declaration.layers) == {
        K_PROJ, *(f"model.layers.{i}.self_attn.q_proj" for i in range(3))
    }  # fmt: skip
    assert "model.layers.0.mlp.up_proj" in declaration.undeclared
    assert codes(declaration) == ["format.layer_missing"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["config_groups"]["group_0"].update(format="marlin-24"), "marlin-24"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=5), "5 bits"),
        (lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (lambda c: c["config_groups"].update(W4A16=["Linear"]), "W4A16"),
    ],
)
def test_compressed_tensors_refusals(
    artifact: Artifact, tmp_path: Path, change: Callable[[Config], object], told: str
) -> None:
    path = edited(artifact("llmcompressor/w8a8"), tmp_path / "copy", change)
    with pytest.raises(InputError, match=told):
        declared(path)


def test_wrong_weight_shape_tensor_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    path = copy_checkpoint(artifact("llmcompressor/w4a16"), tmp_path / "copy")
    edit_tensors(path, lambda t: t.update({f"{K_PROJ}.weight_shape": torch.tensor([576, 192])}))
    checkpoint = open_checkpoint(path)
    spec = compressed_tensors.declare(checkpoint).layers[K_PROJ]
    tensors = {s: checkpoint.tensor(f"{K_PROJ}.{s}")
               for s in ("weight_packed", "weight_scale", "weight_shape")}  # fmt: skip
    with pytest.raises(InputError, match=r"\[576, 192\]"):
        compressed_tensors.read(tensors, spec)


def test_gptq_side_file_alone_and_in_contradiction(artifact: Artifact, tmp_path: Path) -> None:
    source = artifact("gptqmodel/dynamic")
    path = copy_checkpoint(source, tmp_path / "side")
    edit_json(path / "config.json", lambda config: config.pop("quantization_config"))
    assert declared(path).layers == declared(source).layers
    other = copy_checkpoint(source, tmp_path / "other")
    edit_json(other / "quantize_config.json", lambda config: config.update(group_size=128))
    assert codes(declared(other)) == ["format.contradiction"]


def test_gptq_rules(artifact: Artifact, tmp_path: Path) -> None:
    source = artifact("gptqmodel/w4")
    listed = [["self_attn.k_proj"], ["mlp.up_proj"]]
    path = edited(
        source, tmp_path / "listed", lambda c: c.update(modules_in_block_to_quantize=listed)
    )
    assert len(declared(path).layers) == 6
    rules: Config = {"-:.*nothing": {}, "-:.*k_proj": {}, "+:.*k_proj|.*q_proj": {"bits": 8}}
    (path / "quantize_config.json").unlink()
    edit_json(path / "config.json", lambda c: c["quantization_config"].update(
        dynamic=rules, modules_in_block_to_quantize=None))  # fmt: skip
    declaration = declared(path)
    assert declaration.unmatched == ("-:.*nothing",)
    assert set(declaration.ignored.values()) == {"-:.*k_proj"}
    assert declaration.layers["model.layers.0.self_attn.q_proj"].scheme.weight.bits == 8
    edit_json(path / "config.json", lambda c: c["quantization_config"].update(
        checkpoint_format="marlin"))  # fmt: skip
    with pytest.raises(InputError, match="marlin"):
        declared(path)


def test_awq_entries_match_anywhere_and_its_old_side_file(
    artifact: Artifact, tmp_path: Path
) -> None:
    source = artifact("autoround/awq")
    path = edited(
        source,
        tmp_path / "copy",
        lambda c: c.update(modules_to_not_convert=["lm_head", "k_proj", "visual"]),
    )
    declaration = declared(path)
    assert len(declaration.layers) == 18
    assert declaration.unmatched == ("visual",)
    edit_json(path / "config.json", lambda config: config.pop("quantization_config"))
    (path / "quantization_config.json").unlink()
    (path / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    )
    assert declared(path).layers == declared(source).layers


def test_auto_round_overrides(artifact: Artifact, tmp_path: Path) -> None:
    def change(config: Config) -> None:
        config["block_name_to_quantize"] = "model.layers.0,model.layers.1"
        config["extra_config"] |= {
            K_PROJ: {"bits": 16},
            ".*o_proj": {"bits": 16, "data_type": "float"},
            "model.layers.9.mlp.up_proj": {"bits": 8},
            "model.layers.9.mlp.down_proj": {"bits": 16},
        }

    declaration = declared(edited(artifact("autoround/auto_gptq"), tmp_path / "copy", change))
    assert declaration.layers["model.layers.0.mlp.down_proj"].scheme.weight.bits == 8
    assert declaration.ignored == {
        K_PROJ: K_PROJ, **{f"model.layers.{i}.self_attn.o_proj": ".*o_proj" for i in range(3)}
    }  # fmt: skip
    assert "model.layers.2.mlp.up_proj" in declaration.undeclared
    assert declaration.unmatched == ("model.layers.9.mlp.down_proj",)
    assert codes(declaration) == ["format.layer_missing"]


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_of_modelopt(tmp_path: Path, transposed: bool) -> None:
    """3-D expert tensors, in both orientations: declared, met, and read one expert at a time."""
    hidden, inner, experts = 64, 96, 3
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shape = (experts, hidden, 2 * inner) if transposed else (experts, 2 * inner, hidden)
    weight = torch.randn(shape, generator=generator)
    scale = torch.tensor(0.01)
    tensors = {
        name: (weight / scale).to(torch.float8_e4m3fn),
        f"{name}_weight_scale": scale,
        f"{name}_input_scale": torch.tensor(0.5),
        "model.layers.0.mlp.router.weight": torch.randn(experts, hidden).bfloat16(),
        "model.layers.0.mlp.experts.0.down_proj.weight": torch.randn(hidden, inner).to(
            torch.float8_e4m3fn
        ),
        "model.layers.0.mlp.experts.0.down_proj.weight_scale": torch.tensor(1.0),
        "model.layers.0.mlp.experts.0.down_proj.input_scale": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "hidden_size": hidden,
        "num_local_experts": experts,
        "num_hidden_layers": 1,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "ignore": ["model.layers.0.mlp.router"],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    declaration = modelopt.declare(checkpoint)
    assert set(declaration.layers) == {name, "model.layers.0.mlp.experts.0.down_proj"}
    assert set(declaration.ignored) == {"model.layers.0.mlp.router"}
    spec = declaration.layers[name]
    assert (spec.shape, spec.experts, spec.transposed) == ((2 * inner, hidden), experts, transposed)
    found = {}
    for suffix, tensor in modelopt.expected(spec).items():
        full = tensor_name(name, suffix, spec)
        if full in checkpoint.tensors:
            assert checkpoint.tensors[full].shape in tensor.shapes
            found[suffix] = checkpoint.tensor(full)
    assert set(found) == {"weight", "weight_scale", "input_scale"}
    for index in range(experts):
        one = dequantize(modelopt.read(inventory.expert(found, spec, index), spec))
        wanted = weight[index].T if transposed else weight[index]
        assert (one - wanted).abs().max() < 0.2
        assert one.shape == spec.shape


def test_names_are_matched_quickly_in_long_lists(artifact: Artifact) -> None:
    """Official checkpoints list over a thousand entries against tens of thousands of modules."""
    entries = [f"model.layers.{i}.self_attn*" for i in range(1500)]
    matcher = inventory.Matcher([inventory.glob_pattern(entry) for entry in entries])
    assert matcher.entry("model.layers.1499.self_attn.q_proj") == entries[-1]
    assert matcher.entry("model.layers.1500.self_attn.q_proj") is None
    assert matcher.indices("model.layers.12.self_attn") == [12]


def test_checkpoint_values_are_not_read(artifact: Artifact, tmp_path: Path) -> None:
    """A declaration needs headers only: it is the same when every value is zero."""
    source = artifact("gptqmodel/w4")
    zeros = {k: torch.zeros_like(v) for k, v in load_file(source / "model.safetensors").items()}
    save_file(zeros, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    checkpoint: Checkpoint = open_checkpoint(tmp_path)
    assert gptq.declare(checkpoint).layers == declared(source).layers


@pytest.mark.parametrize("place", ["ignore", "targets"])
def test_a_bad_pattern_is_refused_by_name(artifact: Artifact, tmp_path: Path, place: str) -> None:
    def change(config: Config) -> None:
        if place == "ignore":
            config["ignore"].append("re:*")
        else:
            config["config_groups"]["group_0"]["targets"] = ["re:*"]

    path = edited(artifact("llmcompressor/fp8_dynamic"), tmp_path / "model", change)
    with pytest.raises(InputError, match=r"'re:\*'.*nothing to repeat") as caught:
        declared(path)
    assert caught.value.code == "format.pattern"


def test_a_bad_rule_of_gptqmodel_is_refused_by_name(artifact: Artifact, tmp_path: Path) -> None:
    path = edited(
        artifact("gptqmodel/w4"), tmp_path / "model", lambda c: c.update(dynamic={"-:(": {}})
    )
    with pytest.raises(InputError, match=r"'-:\('.*unterminated") as caught:
        declared(path)
    assert caught.value.code == "format.pattern"
