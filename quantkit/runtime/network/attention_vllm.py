"""Rotation and attention on a CPU through vLLM's operators: three calls a layer.

Its attention reads a cache of blocks; here a block is all that one sequence has room for, so that
the cache is as plain a tensor as torch's own attention wants, but for keys that lie turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from quantkit.runtime.network.cache import KVCache
from quantkit.runtime.vllm_ops import cpu as vllm_operators

HEAD_DIMS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
"""Those it is compiled for (vLLM's `CPUAttentionBackend.get_supported_head_sizes`)."""

_ALIGNMENT = 32
_NO_WINDOW = -1


def usable(embed: torch.Tensor, head_dim: int) -> bool:
    """Whether a network with this embedding and heads computes its attention here.

    Not with AMX, for which the operator has another order of the cache.
    """
    fits = head_dim in HEAD_DIMS and not torch.cpu._is_amx_tile_supported()
    return fits and vllm_operators.usable(embed)


class TurnedCache(KVCache):
    """Keys [batch, heads, head_dim, capacity], values [batch, heads, capacity, head_dim].

    What is not written is zero: the operator multiplies it by zero.
    """

    def __init__(
        self, layers: int, shape: tuple[int, int, int, int], *, shared: bool = False
    ) -> None:
        """`shape` as `KVCache` takes it; `shared` layers overwrite each other."""
        batch, heads, capacity, head_dim = shape
        capacity = _aligned(capacity)
        count = 1 if shared else layers
        keys = [_zeros(batch, heads, head_dim, capacity) for _ in range(count)]
        values = [_zeros(batch, heads, capacity, head_dim) for _ in range(count)]
        self.keys, self.values = (tensors * (layers // count) for tensors in (keys, values))
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.values[0].shape[2]

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KVCache.extend`: for a step that the operator does not compute."""
        end = self.length + keys.shape[2]
        turned = self.keys[layer].transpose(2, 3)
        turned[:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        if self.length == 0:
            return keys, values
        return turned[:, :, :end], self.values[layer][:, :, :end]

    def _resize(self, capacity: int) -> None:
        capacity = _aligned(capacity)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            batch, heads, _, head_dim = values.shape
            self.keys[layer] = _zeros(batch, heads, head_dim, capacity)
            self.keys[layer][..., : self.length] = keys[..., : self.length]
            self.values[layer] = _zeros(batch, heads, capacity, head_dim)
            self.values[layer][:, :, : self.length] = values[:, :, : self.length]


@dataclass(frozen=True)
class Operators:
    """The operators' view of one forward pass, which all layers share.

    n new positions after `cache.length` of every sequence, none of them padding. `table`
    [positions, head_dim] holds cosines and then sines.
    """

    cache: TurnedCache
    table: torch.Tensor
    batch: int
    count: int
    heads: int

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, n, heads, head_dim] turned in place; its heads lie side by side."""
        rows = x.flatten(2).flatten(0, 1)
        torch.ops._C.rotary_embedding.default(
            self._positions, rows, None, x.shape[3], self.table, True
        )
        return x

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention, [batch, n, heads, head_dim] each → [batch, n, heads × head_dim].

        Keys and values are written to the cache first.
        """
        kept = self.cache.keys[layer], self.cache.values[layer]
        cached = kept[0].view(kept[1].shape), kept[1]
        torch.ops._C.cpu_attn_reshape_and_cache.default(
            keys.flatten(0, 1), values.flatten(0, 1), *cached, self._slots, self._instructions
        )
        result = queries.new_empty(self.batch * self.count, self.heads, queries.shape[3])
        with vllm_operators.LOCK:
            torch.ops._C.cpu_attention_with_kv_cache.default(
                queries.flatten(0, 1), *cached, result, self._starts, self._lengths,
                queries.shape[3] ** -0.5, True, None, _NO_WINDOW, self._blocks, 0.0,
                self._schedule, None, None,
            )  # fmt: skip
        return result.view(self.batch, self.count, -1)

    @cached_property
    def _positions(self) -> torch.Tensor:
        start = self.cache.length
        return torch.arange(start, start + self.count).repeat(self.batch)

    @cached_property
    def _slots(self) -> torch.Tensor:
        """Where every new position is written, [batch × n]."""
        if self.batch == 1:
            return self._positions
        first = torch.arange(self.batch) * self.cache.capacity
        return self._positions + first.repeat_interleave(self.count)

    @cached_property
    def _starts(self) -> torch.Tensor:
        """Where the queries of each sequence begin, and where they all end."""
        return torch.arange(self.batch + 1, dtype=torch.int32) * self.count

    @cached_property
    def _lengths(self) -> torch.Tensor:
        return torch.full((self.batch,), self.cache.length + self.count, dtype=torch.int32)

    @cached_property
    def _blocks(self) -> torch.Tensor:
        return torch.arange(self.batch, dtype=torch.int32).unsqueeze(1)

    @cached_property
    def _instructions(self) -> str:
        return "vec" if self.cache.values[0].shape[3] % 32 == 0 else "vec16"

    @cached_property
    def _schedule(self) -> torch.Tensor:
        """How the operator shares its work among threads."""
        _, kv_heads, _, head_dim = self.cache.values[0].shape
        schedule: torch.Tensor = torch.ops._C.get_scheduler_metadata(
            self.batch, self.heads, kv_heads, head_dim, self._lengths, torch.bfloat16,
            self._starts, True, _NO_WINDOW, self._instructions, True, None,
        )  # fmt: skip
        return schedule


def _aligned(capacity: int) -> int:
    return -(-capacity // _ALIGNMENT) * _ALIGNMENT


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)
