"""A quantized key-value cache: what comes out of it, and what it would have to hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.runtime.linear.activations import round_groups

FP8_MAX = 448.0


class CacheRule(Protocol):
    """What happens to the keys and values [..., head_dim] of one layer on their way through the
    cache."""

    def through(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class CacheScales:
    """A declared cache: it holds fp8(x / scale), or x / scale in NVFP4's groups along a head."""

    keys: float
    values: float
    element: Literal["fp8", "nvfp4"] = "fp8"

    def through(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = through_fp8 if self.element == "fp8" else through_nvfp4
        return rounded(keys, self.keys), rounded(values, self.values)


@dataclass
class CacheWatch:
    """A cache in 16 bit that notes the largest magnitudes which it held."""

    keys: float = 0.0
    values: float = 0.0

    def through(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = max(self.keys, float(keys.abs().amax()))
        self.values = max(self.values, float(values.abs().amax()))
        return keys, values


def through_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x as an FP8 (E4M3) cache would give it back."""
    codes = (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


def through_nvfp4(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x as an NVFP4 cache would give it back, in groups of 16 along the last dimension."""
    rows = x.float().reshape(-1, x.shape[-1])
    codes = round_groups(rows, SCHEMES["nvfp4"].weight, torch.tensor(scale, device=x.device))
    return (codes * scale).view(x.shape).to(x.dtype)
