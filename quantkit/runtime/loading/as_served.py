"""What the engine computes of a scheme on a GPU: activations stay in 16 bit where it has no kernel.

The rules are vLLM's (`engines/versions`): below a scheme's native compute capability its kernels
(Marlin) take 16-bit activations, whatever the checkpoint says of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit.checkpoint.schemes import Scheme
from quantkit.engines import Gpu, gpu_named
from quantkit.engines.capability import runs_on
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec

ENGINE = "vllm"


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


def as_served(layout: str | None, spec: LayerSpec, gpu: Gpu | None) -> Scheme:
    """The scheme of a layer as the engine computes it on a GPU: as declared, or without its input.

    Without a GPU, and where the engine does not run the scheme, it is the declared one.
    """
    if gpu is None or layout is None or spec.scheme.input is None:
        return spec.scheme
    runs = runs_on(ENGINE, layout, spec.packing, spec.scheme.name, gpu)
    return replace(spec.scheme, input=None) if runs == "weight-only" else spec.scheme
