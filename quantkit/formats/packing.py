"""Sub-byte codes in wider words, both ways, in plain vectorised torch.

Three families: nibbles in bytes (FP4 and ModelOpt's int4), fields of an int32 word that do not
cross words (compressed-tensors, AWQ, GPTQ at 2, 4 and 8 bits), and GPTQ's 3-bit fields that do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0 … 15 [..., n] → uint8 [..., n/2], the even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [..., n] → uint8 codes [..., 2n]."""
    import torch

    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
