"""FP8 and INT8 weights and activations on a GPU by CUTLASS, as vLLM compiles it.

`cutlass_scaled_mm` (vLLM, csrc/quantization/w8a8/cutlass) takes one scale a tensor or a token of
the input, and one a tensor or a channel of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit.formats.base import QuantWeight
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels import fp8_scaled_mm, int8_triton
from quantkit.runtime.linear.kernels.base import no_gpu, no_triton
from quantkit.runtime.vllm_ops import cuda as vllm_cuda_operators

NAME = "cutlass_vllm"
_ALIGNMENT = 16


class Packed(NamedTuple):
    """`weight` FP8 or int8 [out, in]; `scale` float32 [out]; `input_scale` [1] where static.

    `whole_input` says that a dynamic scale is of the whole input.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    whole_input: bool


def unavailable(device: torch.device) -> str | None:
    """See `Kernel.unavailable`."""
    return no_gpu(device, (8, 9)) or no_triton() or vllm_cuda_operators.missing()


def rejects(layer: LayerDescription) -> str | None:
    """See `Kernel.rejects`."""
    if layer.shape[0] % _ALIGNMENT:
        return f"needs a multiple of 16 outputs, not {layer.shape[0]}"
    if layer.scheme.weight.element == "int8":
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0):
            return "has no product of INT8 from compute capability 10.0 on"
        return int8_triton.rejects(layer)
    return fp8_scaled_mm.rejects(layer)


def prepare(weight: QuantWeight, layer: LayerDescription) -> Packed:
    """See `Kernel.prepare`."""
    assert layer.scheme.input is not None
    scale = weight.scale.reshape(-1).float().expand(layer.shape[0]).contiguous()
    static = None if weight.input_scale is None else weight.input_scale.reshape(1).float()
    whole = layer.scheme.input.granularity == "tensor"
    return Packed(weight.q.contiguous(), scale, static, whole)


def apply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """See `Kernel.apply`."""
    from quantkit.runtime.triton import quantize

    scale = packed.input_scale
    if scale is None and packed.whole_input:
        scale = quantize.tensor_scale(x)
    codes, scale = quantize.by_row(x.contiguous(), packed.weight.dtype, scale)
    result = x.new_empty(x.shape[0], packed.weight.shape[0])
    torch.ops._C.cutlass_scaled_mm.default(
        result, codes, packed.weight.T, scale, packed.scale, None
    )
    return result
