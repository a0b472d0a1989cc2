"""The lean decoder filled from a checkpoint, one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.network.config import expert_count, is_tied
from quantkit.checkpoint.network.families import family_of
from quantkit.checkpoint.progress import Progress
from quantkit.runtime.linear.modules import PlainLinear
from quantkit.runtime.loading.cache_scales import cache_scales
from quantkit.runtime.loading.make_layers import LayerMaker
from quantkit.runtime.loading.memory import release
from quantkit.runtime.loading.mixture import Mixtures
from quantkit.runtime.network.cache_rounding import CacheScales
from quantkit.runtime.network.decoder import Block, Decoder, Shape
from quantkit.runtime.network.devices import enter, shares
from quantkit.runtime.network.mlp import Mlp


def build_decoder(
    config: Any,
    maker: LayerMaker,
    progress: Progress | None = None,
    devices: Sequence[torch.device] = (),
) -> Decoder:
    """The network of a config that `decoder.unsupported` accepts, its layers in equal parts on
    `devices` (none: the maker's), embedding and head on the first; raises InputError."""
    first = maker.device
    shape, eps = Shape.of(config), float(config.rms_norm_eps)
    count = int(config.num_hidden_layers)
    vocabulary, hidden = int(config.vocab_size), int(config.hidden_size)
    embed = _plain(maker, "model.embed_tokens.weight", (vocabulary, hidden))
    mixtures = Mixtures(config, maker) if expert_count(config.to_dict()) else None
    blocks = []
    rules = cache_scales(maker.source, config)
    for index, maker.device in enumerate(shares(count, devices or [first])):
        enter(maker.device)
        name = f"model.layers.{index}"
        mixture = mixtures.block(f"{name}.mlp") if mixtures else None
        mlp = mixture or _mlp(config, maker, f"{name}.mlp")
        blocks.append(_block(config, maker, name, shape, eps, mlp, rules.get(index)))
        release()
        if progress is not None:
            progress(index + 1, count)
    maker.device = first
    enter(first)
    norm = _plain(maker, "model.norm.weight", (hidden,))
    return Decoder(config, embed, blocks, norm, _head(maker, embed))


def _block(
    config: Any,
    maker: LayerMaker,
    name: str,
    shape: Shape,
    eps: float,
    mlp: nn.Module,
    rule: CacheScales | None,
) -> Block:
    hidden = int(config.hidden_size)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kin, everywhere = family_of(config.model_type), bool(getattr(config, "attention_bias", False))
    attention = f"{name}.self_attn"
    head_norms = None
    if kin.qk_norm:
        head_norms = (
            _plain(maker, f"{attention}.q_norm.weight", (shape.head_dim,)),
            _plain(maker, f"{attention}.k_norm.weight", (shape.head_dim,)),
        )
    qkv = maker.merged(
        [f"{attention}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")],
        [(queries, hidden), (keys, hidden), (keys, hidden)],
        everywhere or kin.qkv_bias,
    )
    out = maker.linear(f"{attention}.o_proj", (hidden, queries), everywhere)
    norms = (
        _plain(maker, f"{name}.input_layernorm.weight", (hidden,)),
        _plain(maker, f"{name}.post_attention_layernorm.weight", (hidden,)),
    )
    return Block(shape, eps, norms, head_norms, (qkv, out), mlp, rule)


def _mlp(config: Any, maker: LayerMaker, name: str) -> Mlp:
    hidden, wide = int(config.hidden_size), int(config.intermediate_size)
    bias = bool(getattr(config, "mlp_bias", False))
    gate_up = maker.merged(
        [f"{name}.gate_proj", f"{name}.up_proj"], [(wide, hidden), (wide, hidden)], bias
    )
    return Mlp(gate_up, maker.linear(f"{name}.down_proj", (hidden, wide), bias))


def _head(maker: LayerMaker, embed: torch.Tensor) -> nn.Module:
    """The output head; that of a tied model is the embedding unless it is quantized."""
    source, shape = maker.source, (embed.shape[0], embed.shape[1])
    if "lm_head" in source.layers or not is_tied(source.checkpoint.config):
        return maker.linear("lm_head", shape)
    if source.has("lm_head.weight"):
        source.used.add("lm_head.weight")
    return PlainLinear(embed, None)


def _plain(maker: LayerMaker, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return maker.source.plain(name, shape, maker.dtype).to(maker.device)
