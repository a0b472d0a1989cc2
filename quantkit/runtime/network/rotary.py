"""Rotary position embeddings from a Transformers config, as tables of cosines and sines."""

from __future__ import annotations

from typing import Any

import torch

from quantkit.runtime.network.mlp import fused_on


class Rotary:
    """Tables for positions 0 … n - 1, [n, 1, head_dim / 2], made longer on demand."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies, self._scaling = _frequencies(config)
        self._dtype, self._device = dtype, device
        self._cos = self._sin = torch.empty(0, 1, 0, dtype=dtype, device=device)
        self._joined = torch.empty(0, 0, dtype=dtype, device=device)

    def tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of at least `length` positions, in the model's dtype."""
        if self._cos.shape[0] < length:
            size = max(length, 2 * self._cos.shape[0], 256)
            angles = torch.outer(torch.arange(size, dtype=torch.float32), self._frequencies)
            self._cos = (angles.cos() * self._scaling).to(self._device, self._dtype).unsqueeze(1)
            self._sin = (angles.sin() * self._scaling).to(self._device, self._dtype).unsqueeze(1)
        return self._cos, self._sin

    def joined(self, length: int) -> torch.Tensor:
        """The same as one table [at least length, head_dim]: cosines, then sines."""
        cos, sin = self.tables(length)
        if self._joined.shape[0] != cos.shape[0]:
            self._joined = torch.cat((cos, sin), dim=2).squeeze(1)
        return self._joined


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., heads, head_dim] turned: the first half pairs with the second (Llama's order)."""
    if x.dim() == 4 and x.stride(2) == x.shape[3] and fused_on(x.device):
        from quantkit.runtime.triton import elementwise

        return elementwise.rotate(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    result = torch.empty_like(x)
    left, right = result.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return result


def supported(config: Any) -> bool:
    """Whether the frequencies do not depend on the length of the text."""
    return _parameters(config).get("rope_type", "default") in (
        "default",
        "linear",
        "llama3",
        "yarn",
    )


def _parameters(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _frequencies(config: Any) -> tuple[torch.Tensor, float]:
    parameters = _parameters(config)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        dim = head_dim(config)
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(scaling)


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
