"""What the engine computes of a scheme on a GPU, where that is not what the checkpoint says.

The rules are vLLM's (`engines/versions`): below a scheme's native compute capability its kernels
(Marlin) take 16-bit activations, and those of some GPUs (DeepGEMM) round scales.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit.checkpoint.schemes import Scheme
from quantkit.engines import Gpu, gpu_named
from quantkit.engines.capability import runs_on, served_on
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec, QuantWeight
from quantkit.runtime.linear.activations import FP8_MAX

ENGINE = "vllm"
_LEAST_BLOCK = 1e-4


def gpu_to_serve(as_on: str, device: torch.device) -> Gpu | None:
    """The GPU named by `as_on`, for "" the one that `device` is; None on a CPU and on ROCm.

    Raises InputError for a name that is not known, or not NVIDIA's, whose kernels the rules are of.
    """
    if as_on:
        gpu = gpu_named(as_on, "--as-on")
        if gpu.vendor != "nvidia":
            raise InputError(
                f"--as-on {as_on}: {gpu.name} is not one of NVIDIA's, for which it is known what "
                "the engine computes.",
                hint="--as-on h100, or b200",
                code="runtime.as_on",
            )
        return gpu
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu("here", torch.cuda.get_device_name(device), "", "nvidia", 10 * major + minor)


def as_served(
    layout: str | None, spec: LayerSpec, gpu: Gpu | None, name: str, shape: tuple[int, int]
) -> Scheme:
    """The scheme of a layer as the engine computes it on a GPU: as declared, without its input, or
    with the scales of its input rounded to powers of two (those of the weight: `rounded_scales`).

    `shape` is [out, in] of the whole merged layer. Without a GPU, and where the engine does not run
    the scheme, it is the declared one.
    """
    declared = spec.scheme
    if gpu is None or layout is None or declared.input is None:
        return declared
    of_format = (ENGINE, layout, spec.packing, declared.name, gpu)
    if runs_on(*of_format) == "weight-only":
        return replace(declared, input=None)
    served = served_on(*of_format)
    if served is None or served.switched_off or ".experts." in name:
        return declared
    if shape[0] % served.outputs or shape[1] % served.inputs:
        return declared
    return replace(declared, input=replace(declared.input, scale=served.scales))


def rounded_scales(weight: QuantWeight) -> QuantWeight:
    """FP8 in blocks quantized again, under scales that are powers of two and hold every value.

    As vLLM does for DeepGEMM (`requant_weight_ue8m0_inplace`): dequantized in float32, and each
    block's largest magnitude, at least 1e-4, over 448 taken up to a power of two.
    """
    assert weight.format.block
    rows, columns = weight.q.shape
    height, width = weight.format.block
    grid = weight.scale.float().repeat_interleave(height, 0)[:rows]
    values = weight.q.float() * grid.repeat_interleave(width, 1)[:, :columns]
    padded = torch.nn.functional.pad(values, (0, -columns % width, 0, -rows % height))
    cells = padded.view(-1, height, padded.shape[1] // width, width)
    largest = cells.abs().amax(dim=(1, 3)).clamp(min=_LEAST_BLOCK)
    scale = torch.exp2(torch.ceil(torch.log2(largest / FP8_MAX)))
    codes = (cells / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    codes = codes.view(padded.shape)[:rows, :columns].contiguous()
    return replace(weight, q=codes, scale=scale)
