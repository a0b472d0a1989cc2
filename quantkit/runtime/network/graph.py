"""Decoding on a GPU: one step captured as a CUDA graph, launched whole for every token.

A step of the decoder is some hundred small kernels, which a CPU launches more slowly than a GPU
runs them. Captured once, with the position in device memory, they follow each other without it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding

from quantkit.runtime.linear.kernels.base import no_gpu, no_triton
from quantkit.runtime.network.cache_rounding import CacheScales
from quantkit.runtime.network.decoder import Block, Decoder
from quantkit.runtime.network.experts import Experts, SortedExperts
from quantkit.runtime.network.mlp import Mlp
from quantkit.runtime.network.norm import rms_norm

CAPACITY_STEP = 256
_WIDEST = 16384


def unsupported(network: Decoder) -> str | None:
    """Why steps of this network are not captured on its device, or None."""
    device, width = network.embed.device, network.shape.head_dim
    reason = no_gpu(device) or no_triton()
    if reason is not None:
        return reason
    if len(set(network.devices)) > 1:
        return "its layers are on several devices"
    if one_by_one(network):
        return "its experts are computed one by one"
    rules = network.cache_rules.values()
    if not all(isinstance(rule, CacheScales) and rule.element == "fp8" for rule in rules):
        return "its key-value cache is not in FP8"
    if rules:
        reason = no_gpu(device, (8, 9))
        if reason is not None:
            return f"its FP8 key-value cache {reason}"
    if network.embed.dtype == torch.float32:
        return "computes in 16 bit"
    if width & (width - 1) or width < 16:
        return f"needs a power of two as head_dim, not {width}"
    if network.embed.shape[1] > _WIDEST:
        return f"needs a hidden size of at most {_WIDEST}, not {network.embed.shape[1]}"
    return None


def one_by_one(network: Decoder) -> bool:
    """Whether experts are computed that the router names: the CPU waits for it, which no graph can
    hold."""
    return any(
        isinstance(module, Experts | SortedExperts) and getattr(module, "grouped", None) is None
        for block in network.blocks
        if not isinstance(block.mlp, Mlp)
        for module in block.mlp.modules()  # type: ignore[union-attr]
    )


class DecodeGraph:
    """A cache for `batch` sequences of up to `capacity` positions, and the step that extends it."""

    def __init__(self, network: Decoder, batch: int, capacity: int) -> None:
        device = network.embed.device
        self.network = network
        self.cache = network.new_cache(batch, -(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        self.padding = torch.zeros(batch, dtype=torch.int32, device=device)
        heads = batch * network.shape.kv_heads
        self.arrived = torch.zeros(heads, dtype=torch.int32, device=device)
        self.tables = network.rotary.tables(self.cache.capacity)
        self.graph = torch.cuda.CUDAGraph()
        self.logits = self._capture()

    def fits(self, batch: int, capacity: int) -> bool:
        """Whether its cache holds such sequences."""
        return self.cache.keys[0].shape[0] == batch and capacity <= self.cache.capacity

    def begin(self) -> None:
        """Forget what the cache holds."""
        self.cache.length = 0

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Logits [batch, 1, vocabulary] of the last position.

        The first call takes prompts [batch, n], padded on the left as `attention_mask` says; those
        after it one more id a sequence, [batch, 1], and overwrite the logits of the one before.
        """
        if self.cache.length == 0:
            self.padding.zero_()
            if attention_mask is not None:
                self.padding.copy_((attention_mask == 0).sum(1))
            logits: torch.Tensor = self.network(ids, attention_mask, self.cache, 1)
            self.position.fill_(self.cache.length)
            return logits
        self.ids.copy_(ids.view(-1))
        self.graph.replay()
        self.cache.advance(1)
        return self.logits.unsqueeze(1)

    def _capture(self) -> torch.Tensor:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries set themselves up
            self._compute()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            logits = self._compute()
            self.position.add_(1)
        return logits

    def _compute(self) -> torch.Tensor:
        from quantkit.runtime.triton.elementwise import add_rms_norm

        network = self.network
        x = embedding(self.ids, network.embed)
        normed = rms_norm(x, network.blocks[0].input_norm, network.eps)  # type: ignore[arg-type]
        norms = [*(block.input_norm for block in network.blocks[1:]), network.norm]
        for index, (block, after) in enumerate(zip(network.blocks, norms, strict=True)):
            assert isinstance(block, Block)
            assert isinstance(after, torch.Tensor)
            attended = block.out(self._attend(block, block.qkv(normed), index))
            normed = add_rms_norm(x, attended, block.mlp_norm, block.eps)
            normed = add_rms_norm(x, block.mlp(normed), after, block.eps)
        logits: torch.Tensor = network.head(normed)
        return logits

    def _attend(self, block: Block, qkv: torch.Tensor, index: int) -> torch.Tensor:
        from quantkit.runtime.triton import attention

        keys, values = self.cache.keys[index], self.cache.values[index]
        if block.q_norm is not None and block.k_norm is not None:
            qkv = _norm_heads(block, qkv)
        scales = block.cache_rule
        assert scales is None or isinstance(scales, CacheScales)
        return attention.attend_new(
            qkv, self.tables, self.position, self.padding, keys, values,
            None if scales is None else (scales.keys, scales.values), self.arrived,
        )  # fmt: skip


def _norm_heads(block: Block, qkv: torch.Tensor) -> torch.Tensor:
    assert block.q_norm is not None
    assert block.k_norm is not None
    shape = block.shape
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    turned = shape.heads + shape.kv_heads
    parts = (
        rms_norm(heads[:, : shape.heads], block.q_norm, block.eps),
        rms_norm(heads[:, shape.heads : turned], block.k_norm, block.eps),
        heads[:, turned:],
    )
    return torch.cat(parts, dim=1).flatten(1)
