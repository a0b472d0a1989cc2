"""The quantizers give the bytes of compressed-tensors' own observers and compressors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import (
    QuantizationScheme,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)

from quantkit.backends.streaming.encode import declared, encoder
from quantkit.backends.streaming.rtn import (
    E4M3_UNIT,
    Clip,
    NonFiniteError,
    absolute_maximum,
    decode_e4m3,
    nvfp4_global_scale,
    quantize_rows,
)
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.tensors import torch_dtypes
from tests.support.streaming import scheme_named

PRESETS = {
    "fp8_dynamic": "FP8_DYNAMIC",
    "fp8_block": "FP8_BLOCK",
    "w8a8_dynamic": "W8A8",
    "w8a16": "W8A16",
    "w4a16:128": "W4A16",
    "w4a16:32": "W4A16",
    "w4a16:64:asymmetric": "W4A16_ASYM",
    "nvfp4a16": "NVFP4A16",
    "mxfp4a16": "MXFP4A16",
    "mxfp8": "MXFP8",
}
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def weights(rows: int, columns: int) -> Iterator[torch.Tensor]:
    """Ordinary weights; dead, tiny, huge and one-sided rows; values on every rounding tie."""
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(rows, columns, generator=generator) * 0.02
    yield plain
    odd = plain.clone()
    odd[:, : columns // 2] = 0
    odd[1] = 0
    odd[2, ::2] = -0.0
    for row, factor in enumerate((1e4, 1e-3, 1e-6, 1e-8), 3):
        odd[row] *= factor
    odd[7], odd[8] = odd[7].abs(), -odd[8].abs()
    yield odd
    yield torch.randint(-28, 29, (rows, columns), generator=generator) * 0.25


def reference(weight: torch.Tensor, preset: str, name: str) -> dict[str, torch.Tensor]:
    """What compressed-tensors stores for the weight: its min-max scales, then its compressor."""
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    arguments = scheme.weights
    ours = scheme_named(name).weight
    if ours.granularity == "channel":
        arguments.strategy, arguments.group_size = "channel", None
    elif ours.group_size:
        arguments.group_size = ours.group_size
    if arguments.strategy == "block":
        padded = maybe_pad_tensor_for_block_quant(weight, (128, 128))
        rows, columns = (size // 128 for size in padded.shape)
        cells = padded.view(rows, 128, columns, 128).transpose(1, 2).flatten(-2)
    elif arguments.group_size:
        cells = weight.view(weight.shape[0], -1, arguments.group_size)
    else:
        cells = weight.unsqueeze(-2)
    low, high = cells.amin(-1), cells.amax(-1)
    shared = generate_gparam(low.min(), high.max()) if preset == "NVFP4A16" else None
    scale, zero = calculate_qparams(low, high, arguments, shared)
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight.data.copy_(weight)
    initialize_module_for_quantization(module, scheme, force_zero_point=False)
    for suffix, value in (("scale", scale), ("zero_point", zero), ("global_scale", shared)):
        if hasattr(module, f"weight_{suffix}"):
            getattr(module, f"weight_{suffix}").data.copy_(value)
    compress_module(module)
    return dict(module.state_dict())


def streamed(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """The same through our quantizer and encoder, in two blocks of rows."""
    scheme = scheme_named(name)
    shared = None
    if scheme.weight.scale == "e4m3":
        shared = nvfp4_global_scale(absolute_maximum(weight), weight.dtype)
    shape = (weight.shape[0], weight.shape[1])
    encode = encoder(scheme, "compressed-tensors", shape, shared)
    chunks: dict[str, list[torch.Tensor]] = {}
    for block in (weight[:128], weight[128:]):
        for suffix, data in encode.rows(quantize_rows(block, scheme.weight, global_scale=shared)):
            chunks.setdefault(suffix, []).append(data)
    for suffix, data in encode.end():
        chunks.setdefault(suffix, []).append(data)
    return {suffix: torch.cat(parts) for suffix, parts in chunks.items()}


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_those_of_compressed_tensors(name: str, dtype: torch.dtype) -> None:
    shape = (200, 320) if name == "fp8_block" else (200, 256)
    for weight in weights(*shape):
        theirs = reference(weight.to(dtype), PRESETS[name], name)
        ours = streamed(weight.to(dtype), name)
        promised = declared(scheme_named(name), "compressed-tensors", shape, NAMES[dtype])
        assert ours.keys() == theirs.keys() == promised.keys()
        for suffix, tensor in theirs.items():
            stored, size = promised[suffix]
            assert ours[suffix].shape == tensor.shape == torch.Size(size), suffix
            if stored in torch_dtypes():
                assert ours[suffix].dtype == torch_dtypes()[stored]
            same = ours[suffix].contiguous().view(torch.uint8)
            assert torch.equal(same, tensor.contiguous().view(torch.uint8)), suffix


def noise(weight: torch.Tensor, name: str, clip: Clip) -> float:
    return quantize_rows(weight, scheme_named(name).weight, clip=clip).noise


@pytest.mark.parametrize(
    ("name", "at_most"), [("w4a16:64", 0.93), ("w4a16:128", 0.9), ("w4a16:64:asymmetric", 0.99)]
)
def test_clipping_lowers_the_error_of_real_weights(
    name: str, at_most: float, small_model: Path
) -> None:
    checkpoint = open_checkpoint(small_model)
    for layer in ("mlp.down_proj", "self_attn.q_proj"):
        weight = checkpoint.tensor(f"model.layers.1.{layer}.weight")[:, :512].contiguous()
        assert noise(weight, name, "mse") < at_most * noise(weight, name, "none")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_weights_are_refused(name: str, value: float) -> None:
    weight = next(weights(128, 256)).bfloat16()
    weight[5, 200] = value
    shared = torch.ones(1) if name == "nvfp4a16" else None
    with pytest.raises(NonFiniteError):
        quantize_rows(weight, scheme_named(name).weight, global_scale=shared)


def test_e4m3_codes_decode_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.isnan()]
    decoded = decode_e4m3(finite) * E4M3_UNIT
    assert torch.equal(decoded.view(torch.int32), finite.float().view(torch.int32))
