"""What changes from release to release, and with the GPU: as real engines had it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.engines import Loadable, Verdict, gpu_named, judge
from quantkit.engines.rules import engines, later
from tests.engines.test_mixtures import codes, planned, told

PACKINGS = {"nvfp4a16": "nvfp4-pack-quantized", "w8a16": "pack-quantized"}


def holding(scheme: str, *, experts: bool = True) -> Loadable:
    """The mixture in another scheme, or its dense layers alone."""
    plan = planned("qwen3_moe", experts=experts)
    parts = {
        name: replace(part, scheme=SCHEMES[scheme], packing=PACKINGS.get(scheme, part.packing))
        if part.scheme
        else part
        for name, part in plan.parts.items()
    }
    return replace(plan, parts=parts)


def needs(verdict: Verdict) -> str:
    assert verdict.loads, verdict.reasons
    assert verdict.to_json()["minimum_version"] == verdict.minimum_version
    return verdict.minimum_version


@pytest.mark.parametrize(
    ("engine", "scheme", "experts", "version"),
    [
        ("sglang", "nvfp4a16", False, "0.5.22"),
        ("sglang", "fp8_dynamic", True, ""),
        ("vllm", "w8a16", True, "0.32"),
        ("vllm", "w8a16", False, ""),
        ("vllm", "nvfp4a16", True, ""),
    ],
)
def test_the_release_that_a_scheme_needs(
    engine: str, scheme: str, experts: bool, version: str
) -> None:
    verdict = told(holding(scheme, experts=experts), engine)
    assert needs(verdict) == (version or engines()[engine].minimum_version)
    assert any("from version" in note for note in verdict.notes) == bool(version)


@pytest.mark.parametrize(("gpu", "version"), [("h200", "0.5.22"), ("b200", "")])
def test_the_release_that_a_gpu_without_the_format_needs(gpu: str, version: str) -> None:
    """SGLang 0.5.17 on an H200 would not load W4A4 NVFP4 in compressed-tensors."""
    (verdict,) = judge(holding("nvfp4", experts=False), ("sglang",), (1,), gpu_named(gpu))
    assert needs(verdict) == (version or engines()["sglang"].minimum_version)


def test_experts_in_gptq_are_for_models_in_float16_in_sglang() -> None:
    """SGLang 0.5.17 on an H200: "moe_wna16_marlin_gemm assumes hidden_states.dtype == …"."""
    plan = replace(holding("w4a16"), layout="gptq")
    parts = {name: replace(part, packing="gptq") for name, part in plan.parts.items()}
    plan = replace(plan, parts=parts)
    for dtype, wrong in (("bfloat16", True), ("float16", False)):
        verdict = told(replace(plan, config={**plan.config, "dtype": dtype}), "sglang")
        assert ("engine.dtype" in codes(verdict)) == wrong
        assert "engine.dtype" not in codes(told(plan, "vllm"))


def test_versions_are_compared_as_numbers() -> None:
    assert later("0.5.9", "0.5.22") == "0.5.22"
    assert later("", "0.30") == "0.30"


@pytest.mark.parametrize(("gpu", "rounded"), [("h100", True), ("a100", False), ("l40s", False)])
def test_blocks_are_served_with_rounded_scales_on_hopper(gpu: str, rounded: bool) -> None:
    plan = holding("fp8_block")
    (verdict,) = judge(plan, ("vllm",), (1,), gpu_named(gpu))
    assert any("VLLM_USE_DEEP_GEMM_E8M0=0" in note for note in verdict.notes) == rounded
    assert verdict.environment == ({"VLLM_USE_DEEP_GEMM_E8M0": "0"} if rounded else {})
    (other,) = judge(plan, ("sglang",), (1,), gpu_named("h100"))
    assert not other.notes


def test_experts_in_w4a8_have_a_kernel_on_no_gpu() -> None:
    assert "engine.moe_scheme" in codes(told(holding("w4a8_dynamic"), "vllm"))
    assert told(holding("w4a8_dynamic", experts=False), "vllm").loads
