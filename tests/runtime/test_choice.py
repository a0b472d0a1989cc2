"""`quantkit kernels`: what is said without weights is what loading does; SGLang's names resolve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.errors import InputError
from quantkit.runtime.linear.kernels import select, sglang
from quantkit.runtime.load import load
from quantkit.runtime.preview import preview, refuse
from quantkit.runtime.vllm_ops import cpu as vllm_operators
from tests.support.cli import quantkit, refused

pytestmark = pytest.mark.broad

Artifact = Callable[[str], Path]

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name", ["llmcompressor/w8a8", "gptqmodel/dynamic", "autoround/awq", "modelopt/mixed"]
)
def test_a_preview_is_what_loading_does(artifact: Artifact, name: str) -> None:
    def key(record: object) -> str:
        return str(vars(record)["module"])

    told = sorted(preview(artifact(name), CPU), key=key)
    assert told == sorted(load(artifact(name), device="cpu").layers, key=key)


def test_what_loading_would_refuse_is_refused_from_headers(artifact: Artifact) -> None:
    for name in ("llmcompressor/w8a8", "gptqmodel/dynamic", "autoround/awq", "modelopt/mixed"):
        refuse(artifact(name), [CPU])
    with pytest.raises(InputError) as caught:
        refuse(artifact("llmcompressor/w8a8"), [CPU], "int4_cpu")
    assert caught.value.code == "kernel.refused"


def test_vllms_operators_are_not_taken_on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_operators.SWITCH)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    vllm_operators.missing.cache_clear()
    assert "less exact" in str(vllm_operators.missing())
    vllm_operators.missing.cache_clear()


def test_the_command_names_kernels_and_reasons(artifact: Artifact, small_model: Path) -> None:
    listed = quantkit("kernels", "--device", "cpu", "--json").document
    assert [row["name"] for row in listed["kernels"]] == select.names()
    for row, kernel in zip(listed["kernels"], select.KERNELS, strict=True):
        assert row["reason"] == kernel.unavailable(CPU)
    assert listed["gemm_backend_auto"] == dict.fromkeys(sglang.OPTIONS)

    path = artifact("llmcompressor/fp8_dynamic")
    run = quantkit("kernels", path, "--device", "cpu", "--json")
    assert {layer["kernel"] for layer in run.document["layers"]} == {"reference"}
    assert set(run.document["layers"][0]["refused"]) >= {"int8_cpu", "int4_cpu"}
    text = quantkit("kernels", path, "--device", "cpu").out
    assert "reference" in text
    assert "computes INT8 weights" in text
    assert "no layer is quantized" in quantkit("kernels", small_model, "--device", "cpu").out
    weights = quantkit("kernels", path, "--kernel", "dequantized", "--device", "cpu").out
    assert "weights only" in weights


def test_the_command_without_a_checkpoint_lists_the_kernel_that_is_named() -> None:
    one = quantkit("kernels", "--kernel", "int8_cpu", "--device", "cpu", "--json").document
    assert [row["name"] for row in one["kernels"]] == ["int8_cpu"]
    backend = quantkit("kernels", "--kernel", "deep_gemm", "--device", "cpu", "--json").document
    assert {row["name"] for row in backend["gemm_backends"]} == {"deep_gemm"}
    refused(quantkit("kernels", "--kernel", "nonsense"), 1, "There is no kernel 'nonsense'")


@pytest.mark.parametrize("backend", sglang.names())
def test_a_backend_of_sglang_is_refused_where_it_cannot_run(
    artifact: Artifact, backend: str
) -> None:
    path = artifact("llmcompressor/fp8_dynamic")
    with pytest.raises(InputError) as caught:
        load(path, device="cpu", kernel=backend)
    assert caught.value.code == "kernel.refused"
    assert f"{backend} needs" in caught.value.message
    assert "this is CPU" in caught.value.message


def test_a_refused_backend_ends_the_command(artifact: Artifact) -> None:
    path = artifact("llmcompressor/fp8_dynamic")
    run = quantkit("kernels", path, "--kernel", "deep_gemm", "--device", "cpu")
    assert run.code == 1
    assert "SM90 or SM100" in run.err


ORDER = [
    # GPU, packages that are there, fp8 auto, fp4 auto
    ("SM90", {"deep_gemm", "sgl_kernel", "triton"}, "deep_gemm", None),
    ("SM90", {"sgl_kernel", "triton"}, "cutlass", None),
    ("SM90", {"triton"}, "triton", None),
    ("SM89", {"triton"}, "triton", None),
    ("SM100", {"flashinfer", "sgl_kernel", "triton"}, "flashinfer_trtllm", "flashinfer_cutlass"),
    ("SM100", {"deep_gemm", "flashinfer", "triton"}, "deep_gemm", "flashinfer_cutlass"),
    ("SM100", {"sgl_kernel", "triton"}, "cutlass", "cutlass"),
    ("SM120", {"flashinfer", "sgl_kernel", "triton"}, "triton", "flashinfer_cudnn"),
    ("SM120", {"sgl_kernel", "triton"}, "triton", "cutlass"),
    ("ROCm", {"aiter", "triton"}, "aiter", None),
    ("CPU", {"triton"}, None, None),
]


@pytest.mark.parametrize(("gpu", "packages", "fp8", "fp4"), ORDER)
def test_auto_is_sglangs_documented_order(
    monkeypatch: pytest.MonkeyPatch, gpu: str, packages: set[str], fp8: str | None, fp4: str | None
) -> None:
    monkeypatch.setattr(sglang, "gpu_of", lambda _: gpu)
    monkeypatch.setattr(sglang, "find_spec", lambda name: name if name in packages else None)
    assert sglang.auto("fp8-gemm-backend", CPU) == fp8
    assert sglang.auto("fp4-gemm-backend", CPU) == fp4


def test_a_backend_stands_for_a_kernel_of_ours_where_both_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang, "gpu_of", lambda _: "SM90")
    monkeypatch.setattr(sglang, "find_spec", lambda name: name)
    assert sglang.refusal("triton", CPU, ["fp8_block_triton"]) is None
    assert sglang.kernels_of("triton") == ["fp8_block_triton"]
    reason = sglang.refusal("deep_gemm", CPU, ["fp8_block_triton"])
    assert reason == "--fp8-gemm-backend deep_gemm: the runtime has none of its kind"
    assert "SM100 or SM120" in str(sglang.refusal("cutlass", CPU, []))
