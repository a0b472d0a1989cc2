"""The key-value cache of one batch: allocated once, written in place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

from quantkit.errors import InputError


class KVCache:
    """Keys and values of every layer, [batch, heads, capacity, head_dim], on the device of each;
    `length` are filled.

    A subclass may keep `keys` in another order; `extend` gives them back in this one.
    Grows by doubling when a forward pass does not fit, so that a caller need not know the length.
    """

    def __init__(
        self, devices: Sequence[torch.device], shape: tuple[int, int, int, int], dtype: torch.dtype
    ) -> None:
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for device in devices]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for device in devices]
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def part(self, rows: slice) -> KVCache:
        """The cache of some sequences, in the same memory."""
        shared = copy(self)
        shared.keys = [tensor[rows] for tensor in self.keys]
        shared.values = [tensor[rows] for tensor in self.values]
        return shared

    def reserve(self, batch: int, count: int) -> None:
        """Make room for `count` more positions of `batch` sequences.

        Raises InputError (`runtime.cache`) when it is a cache of another number of them.
        """
        held = self.keys[0].shape[0]
        if held != batch:
            raise InputError(
                f"The cache holds {held} sequences, and {batch} are given.",
                hint=f"make one of them: model.network.new_cache({batch}, capacity)",
                code="runtime.cache",
            )
        needed = self.length + count
        if needed > self.capacity:
            self._resize(max(needed, 2 * self.capacity))

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [batch, heads, n, head_dim] after the filled part; views of all keys and values.

        `length` stays: `advance` moves it once every layer is written.
        """
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, count: int) -> None:
        """`count` positions were written in every layer."""
        self.length += count

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Positions filled (Transformers' name for `length`)."""
        return self.length

    def _resize(self, capacity: int) -> None:
        self.keys = [self._grown(tensor, capacity) for tensor in self.keys]
        self.values = [self._grown(tensor, capacity) for tensor in self.values]

    def _grown(self, tensor: torch.Tensor, capacity: int) -> torch.Tensor:
        batch, heads, _, head_dim = tensor.shape
        larger = tensor.new_empty(batch, heads, capacity, head_dim)
        larger[:, :, : self.length] = tensor[:, :, : self.length]
        return larger
