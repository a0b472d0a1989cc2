"""The engines' data files: complete, consistent, and as the engines themselves have it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.engines import engines, gpu_named, support
from quantkit.engines.capability import capabilities, gemm_order
from quantkit.engines.rules import EngineRules
from quantkit.errors import InputError

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "gemma2",
    "gemma3", "phi3", "mixtral", "deepseek_v2", "deepseek_v3", "glm4", "glm4_moe", "gpt_oss",
)  # fmt: skip

CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_mm", "Gemma3ForConditionalGeneration"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "glm4_moe": ("glm4_moe", "Glm4MoeForCausalLM"),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "phimoe": ("phimoe", "PhiMoEForCausalLM"),
    "minimax_m2": ("minimax_m2", "MiniMaxM2ForCausalLM"),
    "olmoe": ("olmoe", "OlmoeForCausalLM"),
    "qwen3_next": ("qwen3_next", "Qwen3NextForCausalLM"),
    "ernie4_5_moe": ("ernie45_moe", "Ernie4_5_MoeForCausalLM"),
    "mimo_v2_flash": ("mimo_v2", "MiMoV2FlashForCausalLM"),
    "afmoe": ("afmoe", "AfmoeForCausalLM"),
    "lfm2_moe": ("lfm2_moe", "Lfm2MoeForCausalLM"),
    "granitemoe": ("granitemoe", "GraniteMoeForCausalLM"),
    "granitemoehybrid": ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    "jamba": ("jamba", "JambaForCausalLM"),
    "nemotron_h": ("nemotron_h", "NemotronHForCausalLM"),
    "gemma4_text": ("gemma4", "Gemma4ForCausalLM"),
    "llama4_text": ("llama4", "Llama4ForCausalLM"),
}
"""Family → the file and the class of vLLM that builds it, where the class states its mapping."""


@pytest.mark.parametrize("engine", engines().values(), ids=lambda engine: str(engine.engine))
def test_every_family_is_known(engine: EngineRules) -> None:
    for model_type in FAMILIES:
        assert engine.family({"model_type": model_type}).known, model_type
    assert not engine.family({"model_type": "no_such_model"}).known
    nested = {"model_type": "wrapper", "text_config": {"model_type": "qwen3_moe"}}
    assert engine.family(nested) == engine.family({"model_type": "qwen3_moe"})


@pytest.mark.parametrize("engine", engines().values(), ids=lambda engine: str(engine.engine))
def test_what_is_told_is_part_of_what_is_merged(engine: EngineRules) -> None:
    for family in engine.families:
        assert family.told.items() <= family.merges.items(), family.types
    types = [name for family in engine.families for name in family.types]
    assert len(types) == len(set(types))
    assert set(engine.match) <= set(engine.formats)


def stated_mapping(file: Path, name: str) -> dict[str, list[str]]:
    """`packed_modules_mapping` of a class, read without importing it."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for line in node.body:
                target = line.targets[0] if isinstance(line, ast.Assign) else None
                target = line.target if isinstance(line, ast.AnnAssign) else target
                if isinstance(target, ast.Name) and target.id == "packed_modules_mapping":
                    assert isinstance(line, ast.Assign | ast.AnnAssign)
                    assert line.value is not None
                    value: dict[str, list[str]] = ast.literal_eval(line.value)
                    return value
    raise AssertionError(f"{name} of {file.name} states no packed_modules_mapping")


@pytest.mark.parametrize("model_type", CLASSES)
def test_merges_are_those_of_the_installed_engine(model_type: str, vllm_python: Path) -> None:
    (package,) = vllm_python.parents[1].glob("lib/python*/site-packages/vllm")
    module, name = CLASSES[model_type]
    stated = stated_mapping(package / "model_executor" / "models" / f"{module}.py", name)
    ours = engines()["vllm"].family({"model_type": model_type})
    several = {fused: tuple(parts) for fused, parts in stated.items() if len(parts) > 1}
    assert ours.told == several


DRAFTS = ("MTP", "Eagle", "DSpark", "DFlash", "Draft", "Assistant")


def test_architectures_are_those_of_the_installed_engine(vllm_python: Path) -> None:
    (package,) = vllm_python.parents[1].glob("lib/python*/site-packages/vllm")
    source = (package / "model_executor" / "models" / "registry.py").read_text()
    registered = {
        key.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Dict)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.endswith("_MODELS")
        and not any(
            w in node.targets[0].id for w in ("PREVIOUSLY", "OOT", "BACKEND", "SPECULATIVE")
        )
        for key in node.value.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }
    served = {name for name in registered if not any(word in name for word in DRAFTS)}
    assert engines()["vllm"].architectures == served


def test_the_support_table_follows_the_rules() -> None:
    assert support("modelopt", "FP8", "fp8").engines == ("vllm", "sglang")
    assert support("modelopt", "W4A16_AWQ", "w4a16").export_only
    assert support("gptq", "GPTQ", "w3a16").engines == ("transformers",)
    assert support("ascend", "W4A8_DYNAMIC", "w4a8_dynamic").export_only
    known: Any = {
        *SCHEMES, "fp8_e4m3_channel", "fp8_e4m3_tensor", "fp8_e4m3_tensor_fp8_e4m3_token",
        "fp8_e4m3_channel_fp8_e4m3_tensor", "fp8_e4m3_tensor_fp8_e4m3_tensor",
            "int8_tensor_int8_tensor", "int8_tensor_int8_token",
    }  # fmt: skip
    for engine in engines().values():
        for layout, rule in engine.formats.items():
            if layout not in ("modelopt", "ascend"):
                assert set(rule.schemes) <= known, (engine.engine, layout)


def test_devices_are_found_by_name_and_generation() -> None:
    assert gpu_named("H100") == gpu_named("h100")
    assert gpu_named("hopper").capability == 90
    assert gpu_named("MI300X").vendor == "amd"
    assert gpu_named("ascend-a2").vendor == "ascend"
    with pytest.raises(InputError) as raised:
        gpu_named("voodoo2")
    assert "mi300x" in raised.value.hint


def runs(layout: str, key: str, gpu: str) -> dict[str, str]:
    found = capabilities(layout, key, key, gpu_named(gpu))
    return {c.engine: c.runs for c in found}


@pytest.mark.parametrize(
    ("layout", "key", "gpu", "vllm", "sglang"),
    [
        ("compressed-tensors", "fp8_dynamic", "a100", "weight-only", "weight-only"),
        ("compressed-tensors", "fp8_dynamic", "h100", "native", "native"),
        ("compressed-tensors", "w4a16", "mi300x", "yes", "no"),
        ("gptq", "w4a16", "mi300x", "yes", "no"),
        ("gptq", "w4a16", "h100", "yes", "yes"),
        ("auto-round", "w4a16", "mi300x", "yes", "no"),
        ("modelopt", "FP8", "a100", "weight-only", "no"),
        ("modelopt", "NVFP4", "b200", "native", "native"),
        ("modelopt", "NVFP4", "mi350x", "yes", "no"),
        ("ascend", "W8A8", "ascend-a3", "no", "yes"),
        ("ascend", "W8A8", "h100", "no", "no"),
    ],
)
def test_capabilities(layout: str, key: str, gpu: str, vllm: str, sglang: str) -> None:
    assert runs(layout, key, gpu) == {"vllm": vllm, "sglang": sglang}


def test_the_order_of_gemm_backends() -> None:
    flag = "--fp8-gemm-backend"
    assert gemm_order(gpu_named("rtx5090"))[flag] == ["triton"]
    assert gemm_order(gpu_named("h100"))[flag][0].startswith("deep_gemm")
    assert gemm_order(gpu_named("mi300x"))[flag] == ["aiter", "triton"]
    assert gemm_order(gpu_named("rtx5090"))["--fp4-gemm-backend"][0].startswith("flashinfer_cudnn")
