"""4- and 8-bit integer weights with 16-bit activations on Hopper by Machete, as vLLM compiles it.

Machete (vLLM, csrc/quantization/machete) is what vLLM takes there before Marlin: its products of
many rows run near the rate of 16-bit ones. It arranges the weight by an operator of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels.base import no_gpu, not_bfloat16
from quantkit.runtime.linear.kernels.marlin_vllm import integer_kind, packed
from quantkit.runtime.vllm_ops import cuda as vllm_cuda_operators

NAME = "machete_vllm"
_CAPABILITY = (9, 0)
_OUT, _IN = 128, 64
_GROUPS = (64, 128)
_WHOLE_COLUMN = -1


class Packed(NamedTuple):
    """What `machete_mm` takes; `kind` is its number of the weight's type. `zero` is minus the zero
    point times the scale; both are [groups, out]."""

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    kind: int
    group_size: int


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    reason = no_gpu(device, _CAPABILITY)
    if reason is None and torch.cuda.get_device_capability(device) != _CAPABILITY:
        reason = "runs on Hopper (compute capability 9.0) alone"
    return reason or vllm_cuda_operators.missing_machete()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    weight, (rows, columns) = layer.scheme.weight, layer.shape
    if weight.element not in ("int4", "int8") or layer.scheme.input is not None:
        return "computes INT4 and INT8 weights with 16-bit activations"
    if rows % _OUT or columns % _IN:
        return f"needs multiples of 128 outputs and 64 inputs, not {rows} and {columns}"
    if weight.granularity not in ("channel", "group"):
        return f"needs one weight scale a group or channel, not a {weight.granularity}"
    if weight.group_size not in (None, columns, *_GROUPS) or columns % (weight.group_size or 1):
        return f"needs groups of 64 or 128 that divide the inputs, not {weight.group_size}"
    if layer.has_zero_point and (weight.element == "int8" or not layer.whole_zero_points):
        return "needs 4 bits and whole numbers for zero points"
    return not_bfloat16(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    number, columns = weight.format, layer.shape[1]
    half = 1 << (number.bits - 1)
    codes = (weight.q.view(torch.uint8) + half).T  # wraps: as unsigned, the least code is 0
    kind = integer_kind(number.bits, zero=weight.zero_point is not None)
    words = vllm_cuda_operators.call(
        "machete_prepack_B", B=packed(codes, number.bits, 0).T.contiguous().T,
        a_type=layer.dtype, b_type=kind, group_scales_type=layer.dtype,
    )  # fmt: skip
    scale = weight.scale.to(layer.dtype).T.contiguous()
    zero = None
    if weight.zero_point is not None:
        zero = (-scale * (weight.zero_point + half).T.to(layer.dtype)).contiguous()
    single = number.group_size in (None, columns)
    return Packed(words, scale, zero, kind, _WHOLE_COLUMN if single else number.group_size or 0)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    result: torch.Tensor = vllm_cuda_operators.call(
        "machete_mm", A=x.contiguous(), B=packed.words, b_type=packed.kind, out_type=None,
        group_scales=packed.scale, group_zeros=packed.zero, group_size=packed.group_size,
        channel_scales=None, token_scales=None, schedule=None,
    )  # fmt: skip
    return result
