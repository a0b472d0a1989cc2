"""4- and 8-bit weights with 16-bit activations on a GPU by Marlin, as vLLM compiles it.

The layouts of scales and zero points are those that the kernel reads with one load a thread
(vLLM, csrc/quantization/marlin): columns within 64, or within 32 where a column has one scale, in
the order in which the tensor cores hold them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import FP4_FORMATS, no_gpu, not_bfloat16
from quantkit.runtime.vllm_ops import cuda as vllm_cuda_operators

NAME = "marlin_vllm"
_OUT, _IN = 64, 128
_GROUPS = (32, 64, 128)
_BY_GROUP = [i + 8 * j for i in range(8) for j in range(8)]
_BY_CHANNEL = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
_PAIRS = (0, 2, 1, 3)
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


class Packed(NamedTuple):
    """What `marlin_gemm` takes; `kind` is its number of the weight's type, `rows` is out."""

    words: torch.Tensor
    scale: torch.Tensor
    outer: torch.Tensor | None
    zero: torch.Tensor | None
    workspace: torch.Tensor
    kind: int
    rows: int


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device) or vllm_cuda_operators.missing()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, (rows, columns) = layer.scheme.weight, layer.shape
    if weight.element not in ("int4", "int8", "fp4_e2m1") or layer.scheme.input is not None:
        return "computes INT4, INT8 and FP4 weights with 16-bit activations"
    if rows % _OUT or columns % _IN:
        return f"needs multiples of 64 outputs and 128 inputs, not {rows} and {columns}"
    if weight.element == "fp4_e2m1":
        if (weight.group_size, weight.scale) not in FP4_FORMATS:
            return "computes NVFP4 and MXFP4 of the FP4 formats"
        if layer.negative_scales:
            return "has no form for negative scales"
        return not_bfloat16(layer)
    if weight.granularity not in ("channel", "group"):
        return f"needs one weight scale a group or channel, not a {weight.granularity}"
    if weight.group_size not in (None, columns, *_GROUPS) or columns % (weight.group_size or 1):
        return f"needs groups of 32, 64 or 128 that divide the inputs, not {weight.group_size}"
    if layer.has_zero_point and (weight.element == "int8" or not layer.whole_zero_points):
        return "needs 4 bits and whole numbers for zero points"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    number, (rows, columns) = weight.format, layer.shape
    half = 1 << (number.bits - 1) if number.is_int else 0
    codes = (weight.q.view(torch.uint8) + half).T  # wraps: as unsigned, the least code is 0
    words = vllm_cuda_operators.call(
        "gptq_marlin_repack", b_q_weight=packed(codes, number.bits, 0), size_k=columns,
        size_n=rows, num_bits=number.bits, is_a_8bit=False,
        perm=torch.empty(0, dtype=torch.int32, device=codes.device),
    )  # fmt: skip
    scale = weight.scale.to(layer.dtype).T.contiguous()
    single = scale.shape[0] == 1
    scale = _reordered(scale, _BY_CHANNEL if single else _BY_GROUP)
    zero = outer = None
    if weight.zero_point is not None:
        points = _reordered((weight.zero_point + half).to(torch.uint8).T.contiguous(), _BY_GROUP)
        zero = packed(_reordered(points, _NIBBLES), 4, 1)
    if number.element == "fp4_e2m1":
        scale, outer = _four_bit_scales(scale, weight.global_scale)
    workspace = torch.zeros(
        torch.cuda.get_device_properties(codes.device).multi_processor_count,
        dtype=torch.int32, device=codes.device,
    )  # fmt: skip
    return Packed(words, scale, outer, zero, workspace, _kind(layer, zero is not None), rows)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    x = x.contiguous()
    result: torch.Tensor = vllm_cuda_operators.call(
        "marlin_gemm", a=x, c_or_none=None, b_q_weight=packed.words, b_bias_or_none=None,
        b_scales=packed.scale, a_scales=None, global_scale=packed.outer,
        b_zeros_or_none=packed.zero, g_idx_or_none=None, perm_or_none=None,
        workspace=packed.workspace, b_type_id=packed.kind, size_m=x.shape[0], size_n=packed.rows,
        size_k=x.shape[1], is_k_full=True, use_atomic_add=False, use_fp32_reduce=True,
        is_zp_float=False,
    )  # fmt: skip
    return result


def packed(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """uint8 codes of `bits` as int32 words along a dimension of the matrix, the first lowest."""
    count = 32 // bits
    shape = [size // count if at == dim else size for at, size in enumerate(codes.shape)]
    words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
    for at in range(count):
        part = codes[at::count] if dim == 0 else codes[:, at::count]
        words |= part.int() << bits * at
    return words


def _reordered(grid: torch.Tensor, order: list[int] | tuple[int, ...]) -> torch.Tensor:
    """[groups, out] with the columns of every len(order) in that order."""
    return grid.reshape(-1, len(order))[:, list(order)].reshape(grid.shape).contiguous()


def _four_bit_scales(
    scale: torch.Tensor, outer: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales of FP4 in the 8-bit form that the kernel turns into bfloat16, and the outer scale.

    E8M0 as they are. E4M3, all positive, without the sign and with one more exponent bit: twice
    the bits of float16(scale × 2^7), of which the upper byte stays; scaled up so that the
    uppermost bit is always one, which the outer scale takes back. A scale of less than 2^-14 of the
    largest becomes 0, as in vLLM.
    """
    scale = _reordered(scale, _PAIRS)
    if outer is None:
        return scale.to(torch.float8_e8m0fnu), None
    up = torch.exp2(torch.log2(448 / scale.max().float().clamp(min=2**-9)).floor().clamp(min=0))
    raised = (scale.float() * up).half() * 2**7
    raised[raised < 2] = 0
    upper = (raised.view(torch.int16) << 1).view(torch.float8_e4m3fn)[:, 1::2].contiguous()
    return upper, (outer.float().reshape(1) * 2.0**119 / up).float()


def _kind(layer: LayerDescription, zero: bool) -> int:
    """vLLM's number of the weight's type: 4-bit floats have 2 exponent bits, 1 of mantissa and a
    sign."""
    if layer.scheme.weight.element == "fp4_e2m1":
        return 2 | 1 << 8 | 1 << 16 | 1 << 49
    return integer_kind(layer.scheme.weight.bits, zero=zero)


def integer_kind(bits: int, *, zero: bool) -> int:
    """vLLM's number of an unsigned type: with a bias in its middle, unless there are zero points.

    Exponent and mantissa bits, sign, bias, finiteness, NaNs (vllm/scalar_type.py).
    """
    return bits << 8 | (0 if zero else 1 << (bits - 1)) << 17 | 1 << 50
