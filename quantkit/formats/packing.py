"""Sub-byte codes in wider words, both ways, in plain vectorised torch.

All layouts but AWQ store a row of codes as one little-endian stream of bits: code i sits at bit
i × bits, and at 3 bits it may cross a word (compressed-tensors 0.19, GPTQ). AWQ permutes the eight
codes of each word. Codes are unsigned here; a layout adds its own offset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Position in a word → which of eight consecutive codes is there (AutoAWQ's GEMM kernel)."""


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0 … 15 [..., n] → uint8 [..., n/2], the even column in the low nibble."""
    import torch

    pairs = _view_rows(codes, torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [..., n] → uint8 codes [..., 2n]."""
    import torch

    wide = packed.to(torch.int16)
    pairs = wide.bitwise_left_shift(4).bitwise_or_(wide).bitwise_and_(0x0F0F)
    return _view_rows(pairs, torch.uint8)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., n] of 2, 3, 4 or 8 bits → int32 [..., ceil(n × bits / 32)]."""
    import torch
    from torch.nn.functional import pad

    columns = codes.shape[-1]
    codes = pad(codes, (0, -columns % 32))
    if bits == 8:
        stream = codes
    elif bits == 4:
        stream = pack_nibbles(codes)
    elif bits == 2:
        halves = codes[..., 0::2] | (codes[..., 1::2] << 2)
        stream = pack_nibbles(halves)
    else:
        octets = _split(codes, 8).to(torch.int32)
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=codes.device)
        triples = (octets << shifts).sum(-1, dtype=torch.int32)
        stream = triples.unsqueeze(-1).view(torch.uint8)[..., :3].flatten(-2)
    words = _view_rows(stream, torch.int32)
    return words[..., : words_for(columns, bits)].contiguous()


def unpack_words(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack_words`: int32 [..., w] → uint8 codes [..., columns]."""
    import torch
    from torch.nn.functional import pad

    if bits == 3:
        words = pad(words, (0, -words.shape[-1] % 3))
    stream = _view_rows(words, torch.uint8)
    if bits == 8:
        codes = stream
    elif bits == 4:
        codes = unpack_nibbles(stream)
    elif bits == 2:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=words.device)
        codes = ((stream.unsqueeze(-1) >> shifts) & 3).flatten(-2)
    else:
        triples = pad(_split(stream, 3), (0, 1)).contiguous().view(torch.int32)
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=words.device)
        codes = ((triples >> shifts) & 7).to(torch.uint8).flatten(-2)
    return codes[..., :columns]


def words_for(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` codes takes."""
    return (columns * bits + 31) // 32


def unpack_padded_words(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 words that hold 32 // bits codes each and padding (compressed-tensors before 0.15)."""
    import torch

    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :columns]


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """uint8 4-bit codes [rows, out] → int32 [rows, out/8] in AWQ's order."""
    return pack_words(_split(codes, 8)[..., AWQ_ORDER].flatten(-2), 4)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_awq`: int32 [rows, out/8] → uint8 codes [rows, out]."""
    inverse = [AWQ_ORDER.index(i) for i in range(8)]
    codes = unpack_words(words, 4, words.shape[-1] * 8)
    return _split(codes, 8)[..., inverse].flatten(-2)


def _view_rows(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of each row as another dtype; rows of one element have strides of their own."""
    return tensor.reshape(-1).view(dtype).reshape(*tensor.shape[:-1], -1)


def _split(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """[..., n] → [..., n / size, size]."""
    return tensor.reshape(*tensor.shape[:-1], -1, size)
