"""SGLang's GEMM backends as names of kernels, and which one its "auto" takes on a device.

`--fp8-gemm-backend` is about FP8 in blocks, `--fp4-gemm-backend` about NVFP4. The runtime computes
what a backend computes with a kernel of its own; a backend that it has no counterpart of is refused
by name. Source: SGLang's documentation, "Quantization", GEMM backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

Option = Literal["fp8-gemm-backend", "fp4-gemm-backend"]


@dataclass(frozen=True)
class GemmBackend:
    """A backend: the GPUs that it runs on, the package it comes from, our kernels in its place."""

    option: Option
    name: str
    gpus: tuple[str, ...]
    package: str
    kernels: tuple[str, ...] = ()


_EVERY_GPU = ("SM80", "SM89", "SM90", "SM100", "SM120", "ROCm")

BACKENDS: tuple[GemmBackend, ...] = (
    GemmBackend("fp8-gemm-backend", "deep_gemm", ("SM90", "SM100"), "deep_gemm"),
    GemmBackend("fp8-gemm-backend", "flashinfer_trtllm", ("SM100",), "flashinfer"),
    GemmBackend("fp8-gemm-backend", "flashinfer_cutlass", ("SM100", "SM120"), "flashinfer"),
    GemmBackend("fp8-gemm-backend", "flashinfer_deepgemm", ("SM90",), "flashinfer"),
    GemmBackend("fp8-gemm-backend", "cutlass", ("SM90", "SM100", "SM120"), "sgl_kernel"),
    GemmBackend("fp8-gemm-backend", "triton", _EVERY_GPU, "triton", ("fp8_block_triton",)),
    GemmBackend("fp8-gemm-backend", "aiter", ("ROCm",), "aiter"),
    GemmBackend("fp4-gemm-backend", "cutlass", ("SM100", "SM120"), "sgl_kernel"),
    GemmBackend("fp4-gemm-backend", "flashinfer_cutlass", ("SM100", "SM120"), "flashinfer"),
    GemmBackend("fp4-gemm-backend", "flashinfer_cudnn", ("SM100", "SM120"), "flashinfer"),
    GemmBackend("fp4-gemm-backend", "flashinfer_trtllm", ("SM100",), "flashinfer"),
)

_AUTO: dict[Option, dict[str, tuple[str, ...]]] = {
    "fp8-gemm-backend": {
        "SM120": ("triton",),
        "": ("deep_gemm", "flashinfer_trtllm", "cutlass", "aiter", "triton"),
    },
    "fp4-gemm-backend": {
        "SM120": ("flashinfer_cudnn", "cutlass"),
        "": ("flashinfer_cutlass", "cutlass"),
    },
}
"""Option → GPU ("": any other) → the order of "auto"."""

OPTIONS: tuple[Option, ...] = ("fp8-gemm-backend", "fp4-gemm-backend")


def names() -> list[str]:
    """Every backend's name, once."""
    return list(dict.fromkeys(backend.name for backend in BACKENDS))


def gpu_of(device: torch.device) -> str:
    """The device in SGLang's terms: "SM90", "ROCm", …, or "CPU"."""
    if device.type != "cuda":
        return device.type.upper()
    if torch.version.hip:
        return "ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    return f"SM{major}{minor}" if major < 10 else f"SM{major}0"


def why_not(backend: GemmBackend, device: torch.device) -> str | None:
    """Why SGLang could not use the backend here, or None."""
    gpu = gpu_of(device)
    if gpu not in backend.gpus:
        wanted = "a GPU" if backend.gpus == _EVERY_GPU else " or ".join(backend.gpus)
        return f"--{backend.option} {backend.name} needs {wanted}, and this is {gpu}"
    if find_spec(backend.package) is None:
        return f"--{backend.option} {backend.name} needs the package {backend.package}"
    return None


def refusal(name: str, device: torch.device, present: Sequence[str]) -> str | None:
    """Why no kernel of `present` computes what a backend of this name does here, or None."""
    reasons = []
    for backend in BACKENDS:
        if backend.name == name:
            reason = why_not(backend, device)
            if reason is None and any(kernel in present for kernel in backend.kernels):
                return None
            reasons.append(reason or f"--{backend.option} {name}: the runtime has none of its kind")
    return "; ".join(reasons)


def kernels_of(name: str) -> list[str]:
    """Our kernels in the place of the backends of a name."""
    return [k for backend in BACKENDS if backend.name == name for k in backend.kernels]


def auto(option: Option, device: torch.device) -> str | None:
    """The backend that SGLang's "auto" takes on a device, None where it has none."""
    order = _AUTO[option]
    known = {backend.name: backend for backend in BACKENDS if backend.option == option}
    chosen = order.get(gpu_of(device), order[""])
    return next((name for name in chosen if why_not(known[name], device) is None), None)
