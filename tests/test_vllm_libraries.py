"""Which of vLLM's operator libraries is taken, and every reason for none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantkit.runtime import vllm_cuda_operators, vllm_library
from quantkit.runtime.kernels import marlin_vllm
from quantkit.runtime.layer import Layer
from quantkit.schemes import SCHEMES
from quantkit.validate.builtin import has_vllm_operators


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is loaded as far as these functions know, and nothing is remembered."""
    monkeypatch.setattr(vllm_library, "_loaded", [])
    vllm_cuda_operators.missing.cache_clear()
    yield
    vllm_cuda_operators.missing.cache_clear()


def test_without_an_environment_the_reason_says_how_to_make_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.delenv(vllm_cuda_operators.SWITCH, raising=False)
    reason = vllm_cuda_operators.missing()
    assert reason == "needs vLLM's CUDA operators: quantkit env create vllm-cuda"


def test_the_library_named_by_the_variable_is_taken_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / vllm_cuda_operators.LIBRARY
    reasons = []
    for value, content in (("off", None), (str(file), None), (str(file), b"no library")):
        if content:
            file.write_bytes(content)
        monkeypatch.setenv(vllm_cuda_operators.SWITCH, value)
        vllm_cuda_operators.missing.cache_clear()
        reasons.append(str(vllm_cuda_operators.missing()))
    assert reasons[0] == "QUANTKIT_VLLM_CUDA_OPERATORS is off"
    assert reasons[1] == f"there is no {file}"
    assert reasons[2].startswith("vLLM's operators do not load: ")


def test_a_library_beside_this_quantkit_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('vLLM must not be imported')")
    (package / vllm_cuda_operators.LIBRARY).write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.delenv(vllm_cuda_operators.SWITCH, raising=False)
    assert str(vllm_cuda_operators.missing()).startswith("vLLM's operators do not load: ")


def test_a_second_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = tmp_path / "_C.abi3.so", tmp_path / vllm_cuda_operators.LIBRARY
    monkeypatch.setattr(vllm_library, "_loaded", [first])
    assert vllm_library.load(first) is None
    assert vllm_library.load(second) == "this process has loaded _C.abi3.so"


def test_tests_compute_without_the_operators() -> None:
    assert not has_vllm_operators()


def test_marlin_packs_the_first_code_lowest() -> None:
    codes = torch.randint(16, (16, 24))
    for dim in (0, 1):
        words = marlin_vllm._packed(codes, 4, dim)
        shifted = torch.stack([words >> 4 * at & 15 for at in range(8)], dim + 1)
        assert torch.equal(shifted.flatten(dim, dim + 1).int(), codes.int())


@pytest.mark.parametrize(
    ("scheme", "shape", "zero", "reason"),
    [
        ("w4a16", (4096, 4096), False, None),
        ("w8a16", (4096, 4096), False, None),
        ("nvfp4a16", (4096, 4096), False, None),
        ("nvfp4", (4096, 4096), False, "computes INT4, INT8 and FP4 weights with 16-bit"),
        ("w4a16", (576, 1536), False, None),
        ("w4a16", (96, 1536), False, "needs multiples of 64 outputs and 128 inputs, not 96 and"),
        ("w8a16", (4096, 4096), True, "needs 4 bits and whole numbers for zero points"),
    ],
)
def test_what_marlin_takes(
    scheme: str, shape: tuple[int, int], zero: bool, reason: str | None
) -> None:
    found = marlin_vllm.rejects(Layer("l", SCHEMES[scheme], shape, torch.bfloat16, zero))
    assert found is None if reason is None else str(found).startswith(reason)
