"""A lean decoder for Llama-like networks (Llama, Mistral, Mixtral, Qwen 2 and 3), any
linear layers in it.

The arithmetic is that of Transformers' modules, up to the order of roundings; q/k/v and gate/up
are one product each, and attention is torch's own or, on a CPU, that of vLLM's operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding

from quantkit.checkpoint.network.families import FAMILIES, family_of
from quantkit.runtime.network import attention_vllm, rotary
from quantkit.runtime.network.attention import attend
from quantkit.runtime.network.attention_vllm import Operators, TurnedCache
from quantkit.runtime.network.cache import KVCache
from quantkit.runtime.network.cache_rounding import CacheRule
from quantkit.runtime.network.devices import enter
from quantkit.runtime.network.norm import add_rms_norm, rms_norm
from quantkit.runtime.network.rotary import Rotary, head_dim, rotate

PART_TOKENS = 2048
"""On a CPU a batch goes through all layers in parts of about so many tokens."""


def unsupported(config: Any) -> str | None:
    """Why this decoder does not compute the network of a Transformers config, or None."""
    kin = family_of(config.model_type)
    if kin.network != "decoder":
        computed = sorted(t for f in FAMILIES if f.network == "decoder" for t in f.types)
        return f"model_type {config.model_type} is not one of {', '.join(computed)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if not rotary.supported(config):
        return "its rotary frequencies depend on the length"
    windows = getattr(config, "layer_types", None) or []
    sliding = kin.sliding and getattr(config, "sliding_window", None)
    if sliding or any(kind != "full_attention" for kind in windows):
        return "some of its layers attend to a sliding window"
    return None


@dataclass(frozen=True)
class Shape:
    """Heads and their width."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return cls(heads, kv_heads, head_dim(config))


class Block(nn.Module):
    """One decoder layer; `norms` are the weights before attention and before the MLP, which may be
    a block of experts; `projections` are queries, keys and values in one, and the output."""

    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None

    def __init__(
        self,
        shape: Shape,
        eps: float,
        norms: tuple[torch.Tensor, torch.Tensor],
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
        projections: tuple[nn.Module, nn.Module],
        mlp: nn.Module,
        cache_rule: CacheRule | None,
    ) -> None:
        super().__init__()
        self.shape, self.eps, self.cache_rule = shape, eps, cache_rule
        self.register_buffer("input_norm", norms[0])
        self.register_buffer("mlp_norm", norms[1])
        self.register_buffer("q_norm", head_norms[0] if head_norms else None)
        self.register_buffer("k_norm", head_norms[1] if head_norms else None)
        self.qkv, self.out = projections
        self.mlp = mlp

    def forward(
        self,
        x: torch.Tensor,
        normed: torch.Tensor,
        step: Step,
        index: int,
        next_norm: torch.Tensor,
        keep: int = 0,
    ) -> torch.Tensor:
        """x [batch, n, hidden] and its norm before attention → the norm, by `next_norm`, after all.

        What attention and MLP add is added to x in place; `normed` may be overwritten. With `keep`
        only so many last positions are computed after attention, and x is left.
        """
        attended = self._attend(self.qkv(normed), step, index)
        if keep:
            x, attended = x[:, -keep:].contiguous(), attended[:, -keep:].contiguous()
        normed = add_rms_norm(x, self.out(attended), self.mlp_norm, self.eps)
        return add_rms_norm(x, self.mlp(normed), next_norm, self.eps)

    def _attend(self, qkv: torch.Tensor, step: Step, index: int) -> torch.Tensor:
        batch, count, _ = qkv.shape
        shape = self.shape
        turned, heads = shape.heads + shape.kv_heads, qkv.view(batch, count, -1, shape.head_dim)
        rotated, values = heads[:, :, :turned], heads[:, :, turned:]
        if self.q_norm is not None and self.k_norm is not None:
            rotated = torch.cat(
                (
                    rms_norm(heads[:, :, : shape.heads], self.q_norm, self.eps),
                    rms_norm(heads[:, :, shape.heads : turned], self.k_norm, self.eps),
                ),
                dim=2,
            )
        if step.operators is not None:
            rotated = step.operators.rotate(rotated)
        else:
            rotated = rotate(rotated, step.cos, step.sin)
        queries, keys = rotated[:, :, : shape.heads], rotated[:, :, shape.heads :]
        if self.cache_rule is not None:
            keys, values = self.cache_rule.through(keys, values)
        if step.operators is not None:
            return step.operators.attend(index, queries, keys, values)
        queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))
        if step.cache is not None:
            keys, values = step.cache.extend(index, keys, values)
        return attend(queries, keys, values, step.mask, causal=step.causal)


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share: positions, mask and cache.

    `mask` is boolean [batch, 1, n, all], or None where `causal` (or nothing) says enough. Where
    `operators` are there, they know all of it.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    cache: KVCache | None
    operators: Operators | None = None

    def on(self, device: torch.device) -> Step:
        """The same for layers on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device), mask=mask)


class Decoder(nn.Module):
    """The whole network: embedding, blocks, norm and output head."""

    embed: torch.Tensor
    norm: torch.Tensor

    def __init__(
        self,
        config: Any,
        embed: torch.Tensor,
        blocks: Sequence[Block],
        norm: torch.Tensor,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.shape = Shape.of(config)
        self.eps = float(config.rms_norm_eps)
        self.register_buffer("embed", embed)
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer("norm", norm)
        self.head = head
        self.rotary = Rotary(config, embed.dtype, embed.device)

    @cached_property
    def devices(self) -> list[torch.device]:
        """The device of each layer."""
        return [block.input_norm.device for block in self.blocks]  # type: ignore[misc]

    @property
    def cache_rules(self) -> dict[int, CacheRule]:
        """Layer → what its keys and values go through; those of a cache in 16 bit are left out."""
        rules = {index: block.cache_rule for index, block in enumerate(self.blocks)}
        return {index: rule for index, rule in rules.items() if rule is not None}  # type: ignore[misc]

    @cache_rules.setter
    def cache_rules(self, rules: Mapping[int, CacheRule]) -> None:
        for index, block in enumerate(self.blocks):
            block.cache_rule = rules.get(index)  # type: ignore[assignment]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` positions."""
        shape = (batch, self.shape.kv_heads, capacity, self.shape.head_dim)
        if self._with_operators:
            return TurnedCache(len(self.blocks), shape)
        return KVCache(self.devices, shape, self.embed.dtype)

    def forward(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        keep: int = 0,
    ) -> torch.Tensor:
        """Token ids [batch, n] → logits [batch, keep or n, vocabulary] in the model's dtype.

        `attention_mask` [batch, cached + n] is 0 on padding; `keep` asks for the last positions.
        Raises InputError for a cache of another number of sequences.
        """
        batch, count = ids.shape
        if cache is not None:
            cache.reserve(batch, count)
        parts, wanted = [], self._parts(batch, count)
        for rows in wanted:
            mask = None if attention_mask is None else attention_mask[rows]
            part = cache if cache is None or len(wanted) == 1 else cache.part(rows)
            parts.append(self._normed(ids[rows], self._step(ids[rows].shape, mask, part), keep))
        if cache is not None:
            cache.advance(count)
        normed = parts[0] if len(parts) == 1 else torch.cat(parts)
        logits: torch.Tensor = self.head(normed)
        return logits

    @cached_property
    def _with_operators(self) -> bool:
        return attention_vllm.usable(self.embed, self.shape.head_dim)

    def _parts(self, batch: int, count: int) -> list[slice]:
        """Which sequences go through the layers together."""
        size = max(1, PART_TOKENS // count) if self.embed.device.type == "cpu" else batch
        return [slice(start, start + size) for start in range(0, batch, size)]

    def _normed(self, ids: torch.Tensor, step: Step, keep: int) -> torch.Tensor:
        """What the head takes, [batch, keep or n, hidden]."""
        x = embedding(ids, self.embed)
        normed = rms_norm(x, self.blocks[0].input_norm, self.eps)  # type: ignore[arg-type]
        last = len(self.blocks) - 1
        here = x.device
        for index, (block, device) in enumerate(zip(self.blocks, self.devices, strict=True)):
            if device != here:
                enter(device)
                x, normed, step, here = x.to(device), normed.to(device), step.on(device), device
            after = self.norm if index == last else self.blocks[index + 1].input_norm
            normed = block(x, normed, step, index, after.to(here), keep if index == last else 0)
        if here != self.embed.device:
            enter(self.embed.device)
        return normed.to(self.embed.device)

    def _step(
        self, shape: torch.Size, attention_mask: torch.Tensor | None, cache: KVCache | None
    ) -> Step:
        """What a pass over ids of a shape [batch, n] needs."""
        batch, count = shape
        start = 0 if cache is None else cache.length
        end = start + count
        cos, sin = self.rotary.tables(end)
        if attention_mask is None or bool(attention_mask.all()):
            cos, sin = cos[start:end], sin[start:end]
            if self._with_operators:
                table, heads = self.rotary.joined(end), self.shape.heads
                if cache is None:
                    scratch = (batch, self.shape.kv_heads, count, self.shape.head_dim)
                    cache = TurnedCache(len(self.blocks), scratch, shared=True)
                if isinstance(cache, TurnedCache):
                    operators = Operators(cache, table, batch, count, heads)
                    return Step(cos, sin, None, False, cache, operators)
            causal = start == 0 and count > 1
            mask = None
            if start and count > 1:
                mask = causal_mask(count, end, self.embed.device)
            return Step(cos, sin, mask, causal, cache)
        real = attention_mask.to(self.embed.device, torch.bool)
        positions = (real.long().cumsum(1) - 1).clamp_(min=0)[:, start:]
        mask = causal_mask(count, end, self.embed.device) & real[:, None, None, :]
        diagonal = torch.arange(start, end, device=real.device)
        mask[:, :, diagonal - start, diagonal] = True
        return Step(cos[positions], sin[positions], mask, False, cache)


def causal_mask(count: int, end: int, device: torch.device) -> torch.Tensor:
    """True where the last `count` of `end` positions may look, [count, end]."""
    ones = torch.ones(count, end, dtype=torch.bool, device=device)
    return ones.tril_(end - count)
