"""Where a source's config.json and its tensors contradict each other, as far as that is certain.

Certain are sizes that no network has, and decoders like Llama's, whose layers are all alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.config import expert_count
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.modules import linear_modules
from quantkit.checkpoint.network.sizes import Sizes, sizes
from quantkit.errors import InputError

_LINEAR = re.compile(
    r"model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_POSITIVE = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers",
    "vocab_size",
)  # fmt: skip
_SHOWN = 6

Shape = tuple[int, ...]


def refuse_contradictions(checkpoint: Checkpoint) -> None:
    """InputError with everything in which config.json and the tensors contradict each other."""
    found = [*_impossible_sizes(checkpoint.config), *_empty(checkpoint), *_decoder(checkpoint)]
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise InputError(
            f"{checkpoint.path} contradicts itself: {'; '.join(found[:_SHOWN])}{more}.",
            hint="take config.json and weights from the same model, as it was published",
            code="plan.contradiction",
        )


def _impossible_sizes(config: Mapping[str, Any]) -> Iterator[str]:
    text = text_config(config)
    for key in _POSITIVE:
        value = text.get(key)
        if isinstance(value, int) and value <= 0:
            yield f"config.json states {key}={value}"


def _empty(checkpoint: Checkpoint) -> Iterator[str]:
    """Linear layers without a weight, which nothing can be quantized of."""
    origin = f" (as {checkpoint.derived} gives it)" if checkpoint.derived else ""
    for module in linear_modules(checkpoint.modules):
        if not prod(module.shape):
            yield f"{module.tensor} is empty: {list(module.shape)}{origin}"


def _decoder(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    nested = text_config(config) is not config
    if nested or not family(config).uniform or expert_count(config):
        return
    size = sizes(config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    linear = {
        (int(found.group(1)), found.group(2)): shape
        for name, shape in shapes.items()
        if (found := _LINEAR.fullmatch(name))
    }
    if not linear or size.latent_rank:
        return
    yield from _layers(shapes, config, size)
    yield from _ends(shapes, config, size)
    in_stack = {at: shape for at, shape in linear.items() if at[0] < (size.layers or at[0] + 1)}
    yield from _projections(in_stack, size)
    if not any(".qkv_proj." in name or ".gate_up_proj." in name for name in shapes):
        yield from _siblings(in_stack)


def _layers(names: Iterable[str], config: Mapping[str, Any], size: Sizes) -> Iterator[str]:
    """Fewer layers than stated, or more: those that predict further tokens come after the stack."""
    present = {int(found.group(1)) for name in names if (found := _LAYER.match(name))}
    drafts = bool(config.get("num_nextn_predict_layers")) or any(
        not {"mtp", "nextn"}.isdisjoint(name.split(".")) for name in names
    )
    stated = size.layers
    too_many = not drafts and max(present) >= stated
    if stated and (too_many or not set(range(stated)) <= present):
        absent = sorted(set(range(max(stated, max(present)))) - present)
        without = f", none of layer {absent[0]}" if absent else ""
        yield (
            f"config.json states num_hidden_layers={stated}, the weights are of "
            f"{len(present)} layers{without}"
        )


def _ends(shapes: Mapping[str, Shape], config: Mapping[str, Any], size: Sizes) -> Iterator[str]:
    """The embedding's width and rows, and the head that an untied model must have."""
    table = shapes.get("model.embed_tokens.weight", ())
    if len(table) == 2:
        if size.hidden and table[1] != size.hidden:
            yield f"config.json states hidden_size={size.hidden}, the embedding is {list(table)}"
        if size.vocabulary > table[0]:
            yield f"config.json states vocab_size={size.vocabulary}, the embedding is {list(table)}"
    architectures = config.get("architectures") or ["ForCausalLM"]
    generates = str(architectures[0]).endswith("ForCausalLM")
    untied = config.get("tie_word_embeddings") is False
    if untied and generates and "lm_head.weight" not in shapes:
        yield "config.json states tie_word_embeddings=false, and there is no lm_head.weight"


def _projections(linear: Mapping[tuple[int, str], Shape], size: Sizes) -> Iterator[str]:
    """Projections that are not as long as heads, key-value heads and intermediate_size make them;
    one finding for all layers of a name."""
    wide, narrow = size.heads * size.head, size.shared_heads * size.head
    attention = f"num_attention_heads={size.heads} of head_dim={size.head}"
    shared = f"num_key_value_heads={size.shared_heads} of head_dim={size.head}"
    inner = f"intermediate_size={size.inner}"
    rules = {
        "self_attn.q_proj": (0, wide * (2 if size.gated else 1), attention),
        "self_attn.k_proj": (0, narrow, shared),
        "self_attn.v_proj": (0, narrow, shared),
        "self_attn.o_proj": (1, wide, attention),
        "mlp.gate_proj": (0, size.inner, inner),
        "mlp.up_proj": (0, size.inner, inner),
        "mlp.down_proj": (1, size.inner, inner),
    }
    for leaf, (side, wanted, why) in rules.items():
        wrong = [
            (layer, shape)
            for (layer, name), shape in linear.items()
            if name == leaf and len(shape) == 2 and wanted and shape[side] != wanted
        ]
        if wrong:
            layer, shape = wrong[0]
            others = f" (and in {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
            what = "columns" if side else "rows"
            yield (
                f"config.json states {why}, which makes {wanted} {what}, but "
                f"model.layers.{layer}.{leaf}.weight is {list(shape)}{others}"
            )


def _siblings(linear: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Layers that lack a linear layer which others of the stack have."""
    present = set(linear)
    leaves = sorted({leaf for _, leaf in present})
    for layer in sorted({layer for layer, _ in present}):
        absent = [leaf for leaf in leaves if (layer, leaf) not in present]
        if absent:
            yield f"layer {layer} has no {', '.join(absent)}, other layers have"
