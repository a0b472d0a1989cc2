"""A canonical weight as a layout stores it: the inverse of the formats' `read`.

`dtype` is the 16-bit dtype in which scales of no format of their own are stored. The streaming
writer packs block by block; that it writes the same is a test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantkit.formats.base import LayerSpec, QuantWeight
from quantkit.formats.packing import pack_awq, pack_nibbles, pack_words


def compressed_tensors(
    weight: QuantWeight, spec: LayerSpec, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """As compressed-tensors packs; the activations are dynamic or in 16 bit."""
    assert weight.input_scale is None, "static activation scales are not written"
    number = spec.scheme.weight
    rows, columns = spec.shape
    result: dict[str, torch.Tensor] = {}
    zero_point = None if weight.zero_point is None else weight.zero_point.to(torch.int8)

    if spec.packing == "pack-quantized":
        result["weight_packed"] = pack_words(_unsigned(weight.q, number.bits), number.bits)
        result["weight_shape"] = torch.tensor([rows, columns])
        if zero_point is not None and number.granularity in ("group", "channel"):
            along_rows = _unsigned(zero_point.T.contiguous(), number.bits)
            zero_point = pack_words(along_rows, number.bits).T.contiguous()
    elif number.element == "fp4_e2m1":
        result["weight_packed"] = pack_nibbles(weight.q)
    else:
        result["weight"] = weight.q

    scale = weight.scale.reshape(-1) if number.granularity == "tensor" else weight.scale
    if number.scale == "e8m0":
        result["weight_scale"] = encode_e8m0(scale)
    elif number.scale == "e4m3":
        assert weight.global_scale is not None
        result["weight_scale"] = scale.to(torch.float8_e4m3fn)
        result["weight_global_scale"] = (1 / weight.global_scale.double()).float().reshape(1)
    else:
        result["weight_scale"] = scale.to(dtype)
    if zero_point is not None:
        result["weight_zero_point"] = zero_point
    if weight.g_idx is not None:
        result["weight_g_idx"] = weight.g_idx
    if weight.bias is not None:
        result["bias"] = weight.bias
    return result


def gptq(weight: QuantWeight, spec: LayerSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As GPTQ packs; signed codes and zero points get the offset of 2^(bits - 1)."""
    bits = spec.scheme.weight.bits
    codes, zeros = _with_zeros(weight, bits)
    if spec.packing == "gptq":
        zeros = (zeros - 1) & ((1 << bits) - 1)
    g_idx = weight.g_idx
    if g_idx is None:
        columns = spec.shape[1]
        size = spec.scheme.weight.group_size or columns
        g_idx = torch.arange(columns, dtype=torch.int32) // size
    result = {
        "qweight": pack_words(codes, bits).T.contiguous(),
        "qzeros": pack_words(zeros.to(torch.uint8).T.contiguous(), bits),
        "scales": weight.scale.T.to(dtype).contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }
    if weight.bias is not None:
        result["bias"] = weight.bias
    return result


def awq(weight: QuantWeight, spec: LayerSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As AWQ packs; signed codes and zero points get the offset of 8."""
    codes, zeros = _with_zeros(weight, spec.scheme.weight.bits)
    result = {
        "qweight": pack_awq(codes.T.contiguous()),
        "qzeros": pack_awq(zeros.to(torch.uint8).T.contiguous()),
        "scales": weight.scale.T.to(dtype).contiguous(),
    }
    if weight.bias is not None:
        result["bias"] = weight.bias
    return result


Writer = Callable[[QuantWeight, LayerSpec, torch.dtype], dict[str, torch.Tensor]]
WRITERS: dict[str, Writer] = {"compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq}


def _with_zeros(weight: QuantWeight, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as uint8 and zero points as int32 on the grid of the scale, both unsigned."""
    signed = weight.q.dtype == torch.int8
    offset = 1 << (bits - 1) if signed else 0
    codes = (weight.q.to(torch.int16) + offset).to(torch.uint8) if signed else weight.q
    if weight.zero_point is None:
        assert signed, "unsigned codes need their zero points"
        return codes, torch.full(weight.scale.shape, offset, dtype=torch.int32)
    return codes, weight.zero_point.to(torch.int32) + offset


def _unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes with the offset of 2^(bits - 1)."""
    if bits == 8:
        return codes.view(torch.uint8) ^ 128
    return (codes + (1 << (bits - 1))).view(torch.uint8)


def encode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """float32 powers of two → uint8 exponents, biased by 127 (the inverse of `decode_e8m0`)."""
    return (torch.log2(scale.double()).round() + 127).to(torch.uint8)
