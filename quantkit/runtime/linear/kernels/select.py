"""The ordered list of kernels, and the choice of one for a layer with every refusal's reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantkit.errors import InputError
from quantkit.runtime.linear.description import LayerDescription
from quantkit.runtime.linear.kernels import (
    cutlass_vllm,
    dequantized,
    fp4_triton,
    fp8_block_triton,
    fp8_scaled_mm,
    int4_cpu,
    int4_tinygemm,
    int4_triton,
    int8_cpu,
    int8_float_cpu,
    int8_triton,
    int8_vllm,
    int8_weight_cpu,
    machete_vllm,
    marlin_vllm,
    reference,
    sglang,
    weight8_triton,
)
from quantkit.runtime.linear.kernels.base import Kernel

KERNELS: tuple[Kernel, ...] = (
    int8_vllm,
    int8_cpu,
    int4_cpu,
    int8_weight_cpu,
    int8_float_cpu,
    cutlass_vllm,
    machete_vllm,
    marlin_vllm,
    fp8_scaled_mm,
    fp8_block_triton,
    int8_triton,
    int4_triton,
    int4_tinygemm,
    weight8_triton,
    fp4_triton,
    reference,
    dequantized,
)
"""In order of preference; the first that fits is taken. `reference` fits always: `dequantized` is
taken by name alone.

On a GPU those that engines serve with come first, so that throughput is theirs; ours are the
fallback."""


@dataclass(frozen=True)
class Choice:
    """The kernel of a layer, and why each one before it was not taken.

    `weights_only` says that the scheme quantizes activations and the kernel does not.
    """

    kernel: Kernel
    refused: Mapping[str, str] = field(default_factory=dict)
    weights_only: bool = False


def names() -> list[str]:
    """Every kernel's name, in order."""
    return [kernel.NAME for kernel in KERNELS]


def choose(layer: LayerDescription, device: torch.device, allowed: Sequence[str] = ()) -> Choice:
    """The first kernel that fits, of those in `allowed` and in its order (empty: all, ours).

    A name in `allowed` is a kernel's, or that of one of SGLang's GEMM backends.
    Raises InputError (`kernel.refused`) with all reasons when none of `allowed` fits.
    """
    candidates, refused = _candidates(allowed, device)
    for kernel in candidates:
        reason = kernel.unavailable(device) or kernel.rejects(layer)
        if reason is None:
            weights_only = kernel.NAME == dequantized.NAME and layer.quantizes_input
            return Choice(kernel, refused, weights_only)
        refused[kernel.NAME] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise InputError(
        f"No kernel asked for can run {layer.name} ({layer.scheme.name}) on {device}: {listed}.",
        hint="leave the choice to --kernel auto, or see quantkit kernels DIR",
        code="kernel.refused",
    )


def check_name(name: str, device: torch.device) -> None:
    """InputError (`kernel.unknown`) for a name that is neither a kernel's nor a backend's."""
    if name != "auto":
        _candidates([name], device)


def _candidates(
    allowed: Sequence[str], device: torch.device
) -> tuple[Sequence[Kernel], dict[str, str]]:
    """The kernels to try, and SGLang's backends among the names that none of them stands for."""
    if not allowed:
        return KERNELS, {}
    known = {kernel.NAME: kernel for kernel in KERNELS}
    found, refused = [], {}
    for name in allowed:
        if name in known:
            found.append(known[name])
        elif name in sglang.names():
            reason = sglang.refusal(name, device, list(known))
            if reason is None:
                found += [known[own] for own in sglang.kernels_of(name)]
            else:
                refused[name] = reason
        else:
            raise InputError(
                f"There is no kernel {name!r}; known are {', '.join(known)}, and SGLang's "
                f"{', '.join(sglang.names())}.",
                hint="quantkit kernels",
                code="kernel.unknown",
            )
    return found, refused


def packed_tensors(packed: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a kernel keeps for a layer."""
    for value in vars(packed).values() if hasattr(packed, "__dict__") else packed:
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "__dict__"):
            yield from packed_tensors(value)
