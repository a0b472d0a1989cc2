"""Which of vLLM's operator libraries is taken, and every reason for none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.formats.dequantize import dequantize
from quantkit.runtime.linear.description import LayerDescription, centred, describe
from quantkit.runtime.linear.kernels import base, machete_vllm, marlin_vllm
from quantkit.runtime.linear.kernels.select import KERNELS
from quantkit.runtime.vllm_ops import cuda as vllm_cuda_operators
from quantkit.runtime.vllm_ops import library as vllm_library
from quantkit.validation.subjects.builtin import has_vllm_operators
from tests.support.kernels import random_weight


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is loaded as far as these functions know, and nothing is remembered."""
    monkeypatch.setattr(vllm_library, "_loaded", [])
    monkeypatch.setattr(vllm_library, "_registered", lambda: False)
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


def test_a_vllm_that_is_imported_already_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm_library, "_registered", lambda: True)
    assert vllm_library.load(tmp_path / "x.so") == "this process has imported a vLLM of its own"


REPACK = "gptq_marlin_repack(Tensor b_q_weight, {}SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit) -> Tensor"  # noqa: E501
GEMM = (
    "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, "
    "Tensor b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, {}"
    "Tensor workspace, int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, {}"
    "bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor"
)
SCALED = "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()"  # noqa: E501
VERSIONS = {
    "0.26": [
        REPACK.format("Tensor perm, "),
        GEMM.format("Tensor? g_idx_or_none, Tensor? perm_or_none, ", "bool is_k_full, "),
        SCALED,
    ],
    "0.33": [REPACK.format(""), GEMM.format("", ""), SCALED],
}
"""The schemas that the two versions' libraries register."""


@pytest.fixture
def operators(request: pytest.FixtureRequest) -> Iterator[list[tuple[Any, ...]]]:
    """Operators of these schemas that only note what they are called with: there is no GPU here."""
    library: Any = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    called: list[tuple[Any, ...]] = []

    def note(*given: Any) -> torch.Tensor:
        called.append(given)
        return torch.zeros(1, dtype=torch.int32)

    schemas = request.param if isinstance(request.param, list) else VERSIONS[request.param]
    for schema in schemas:
        library.define(schema)
        library.impl(schema.split("(")[0], note, "CPU")
    yield called
    library._destroy()


@pytest.mark.parametrize(
    ("operators", "arguments"), [("0.26", (6, 19)), ("0.33", (5, 16))], indirect=["operators"]
)
def test_marlin_is_called_as_either_version_wants(
    operators: list[tuple[Any, ...]], arguments: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vllm_cuda_operators.unlike() is None
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    scheme = SCHEMES["w4a16"]
    weight = centred(random_weight(scheme, (128, 256)))
    layer = describe("l", scheme, weight, torch.bfloat16)
    packed = marlin_vllm.prepare(weight, layer)
    marlin_vllm.apply(torch.zeros(3, 256, dtype=torch.bfloat16), packed)
    assert tuple(map(len, operators)) == arguments
    words = operators[0][0]
    assert torch.equal((words[0] & 15).int(), weight.q[:, 0].int() + 8)
    assert torch.equal((words[31] >> 28 & 15).int(), weight.q[:, 255].int() + 8)


MACHETE = [
    *VERSIONS["0.26"],
    "machete_prepack_B(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type) -> Tensor",  # noqa: E501
    "machete_mm(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales, "
    "Tensor? group_zeros, int? group_size, Tensor? channel_scales, Tensor? token_scales, "
    "str? schedule) -> Tensor",
]


@pytest.mark.parametrize("operators", [MACHETE], indirect=True)
@pytest.mark.parametrize("symmetric", [True, False])
def test_machete_is_called_as_vllm_calls_it(
    operators: list[tuple[Any, ...]], symmetric: bool
) -> None:
    """Column-major words; minus the zero point times the scale, so that w = q s + z."""
    known = vllm_cuda_operators._ARGUMENTS_OF_MACHETE
    assert vllm_cuda_operators._unlike(torch.ops._C, known) is None
    scheme = SCHEMES["w4a16"].with_weight(group_size=64, symmetric=symmetric)
    weight = centred(random_weight(scheme, (128, 256)))
    layer = describe("l", scheme, weight, torch.bfloat16)
    assert machete_vllm.rejects(layer) is None
    machete_vllm.apply(
        torch.zeros(3, 256, dtype=torch.bfloat16), machete_vllm.prepare(weight, layer)
    )
    (words, activations, kind, _), (_, _, _, _, scale, zero, size, _, _, _) = operators
    assert words.shape == (32, 128)
    assert words.stride() == (1, 32)
    assert torch.equal((words[0] & 15).int(), weight.q[:, 0].int() + 8)
    assert (activations, size) == (torch.bfloat16, 64)
    assert kind == (4 << 8 | 8 << 17 | 1 << 50 if symmetric else 4 << 8 | 1 << 50)
    assert scale.shape == (4, 128)
    codes = (weight.q + 8).float().view(128, 4, 64)
    made = codes * scale.T[..., None] + (0 if zero is None else zero.T[..., None])
    made = made if zero is not None else made - 8 * scale.T[..., None]
    wanted = dequantize(weight)
    assert (made.flatten(1) - wanted).norm() < 0.01 * wanted.norm()


def test_machete_leaves_what_its_tiles_do_not_hold_to_marlin() -> None:
    for shape, group in (((64, 256), 64), ((128, 96), 32), ((128, 256), 32)):
        scheme = SCHEMES["w4a16"].with_weight(group_size=group)
        layer = describe("l", scheme, centred(random_weight(scheme, shape)), torch.bfloat16)
        assert "needs" in str(machete_vllm.rejects(layer))
    order = [kernel.NAME for kernel in KERNELS]
    assert order.index("machete_vllm") < order.index("marlin_vllm")


def test_negative_scales_are_refused_by_marlin_before_the_weight_is_packed() -> None:
    """As the first kernel of a GPU it must leave such a layer to the next one."""
    scheme = SCHEMES["nvfp4a16"]
    weight = centred(random_weight(scheme, (128, 256)))
    assert marlin_vllm.rejects(describe("l", scheme, weight, torch.bfloat16)) is None
    weight.scale[0, 0] *= -1
    reason = marlin_vllm.rejects(describe("l", scheme, weight, torch.bfloat16))
    assert reason == "has no form for negative scales"


@pytest.mark.parametrize(
    ("operators", "reason"),
    [
        ([SCALED, REPACK.format("")], "this vLLM has no operator marlin_gemm"),
        (
            [SCALED, REPACK.format("int tile, "), GEMM.format("", "")],
            "this vLLM's gptq_marlin_repack takes an unknown argument, tile",
        ),
    ],
    indirect=["operators"],
)
def test_operators_of_an_unknown_kind_are_refused(
    operators: list[tuple[Any, ...]], reason: str
) -> None:
    assert vllm_cuda_operators.unlike() == reason
    assert not operators


@pytest.mark.parametrize(
    ("found", "triton", "gluon"),
    [
        ("3.4.0", "needs Triton 3.5, this is 3.4.0", "needs Triton 3.6, this is 3.4.0"),
        ("3.5.1", None, "needs Triton 3.6, this is 3.5.1"),
        ("3.6.0", None, None),
    ],
)
def test_an_old_triton_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str, triton: str | None, gluon: str | None
) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: name)
    monkeypatch.setattr(base, "version", lambda _: found)
    base.no_triton.cache_clear()
    reasons = base.no_triton(), base.no_gluon()
    base.no_triton.cache_clear()
    for reason, wanted in zip(reasons, (triton, gluon), strict=True):
        assert reason == wanted if wanted is None else str(reason).startswith(wanted)


def test_tests_compute_without_the_operators() -> None:
    assert not has_vllm_operators()


def test_marlin_packs_the_first_code_lowest() -> None:
    codes = torch.randint(16, (16, 24), dtype=torch.uint8)
    for dim in (0, 1):
        words = marlin_vllm.packed(codes, 4, dim)
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
    found = marlin_vllm.rejects(LayerDescription("l", SCHEMES[scheme], shape, torch.bfloat16, zero))
    assert found is None if reason is None else str(found).startswith(reason)
