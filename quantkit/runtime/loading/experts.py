"""The experts of Transformers' module replaced by ours, with the checkpoint's layers in them.

Transformers 5 holds the experts of a mixture in 3-D parameters. A checkpoint has them so, or one by
one, and calls the layers of one as its family or a library does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from quantkit.checkpoint.network.fused_experts import fused_layer
from quantkit.errors import InputError
from quantkit.runtime.linear.grouped.base import Activation
from quantkit.runtime.linear.grouped.select import group
from quantkit.runtime.linear.modules import PlainLinear
from quantkit.runtime.loading.make_layers import LayerMaker
from quantkit.runtime.loading.memory import release
from quantkit.runtime.loading.names import FileNames
from quantkit.runtime.network.experts import (
    GroupedExperts,
    PaddedExperts,
    SortedExperts,
)
from quantkit.runtime.network.mlp import silu_mul

_GATE = ("gate_proj", "w1")
_UP = ("up_proj", "w3")
_DOWN = ("down_proj", "w2")


def find_experts(model: Any) -> dict[str, nn.Module]:
    """Every module that holds the weights of experts, by name.

    Raises InputError (`runtime.architecture`) for experts that are kept in no known way.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _kind(module) is not None:
            found[name] = module
    for name, weight in model.named_parameters():
        owner = next((part for part in found if name.startswith(f"{part}.")), None)
        if weight.dim() == 3 and "expert" in name and owner is None:
            holder = model.get_submodule(name.rpartition(".")[0])
            raise InputError(
                f"The runtime does not compute the experts of {model.config.model_type}: "
                f"{type(holder).__name__} holds them as {name.rpartition('.')[2]} "
                f"{list(weight.shape)}.",
                hint="quantkit validate DIR --engine vllm",
                code="runtime.architecture",
            )
    return found


def router_widths(experts: dict[str, nn.Module]) -> set[int]:
    """How many experts a router of theirs may tell apart (zero experts included)."""
    weights = (weight for module in experts.values() for weight in module.parameters())
    counts = {len(weight) for weight in weights if weight.dim() == 3}
    return counts | {int(getattr(module, "num_experts", 0)) for module in experts.values()}


def replace_experts(
    model: Any, experts: dict[str, nn.Module], maker: LayerMaker, names: FileNames
) -> Iterator[None]:
    """Put our modules in their place, one at a step. Raises InputError as `LayerMaker` does."""
    for name, module in experts.items():
        make = _kind(module)
        assert make is not None, name
        model.set_submodule(name, make(_Place(name, module, maker, names)))
        release()
        yield


@dataclass(frozen=True)
class _Place:
    """Where experts stood: their name and Transformers' module, on the meta device."""

    name: str
    module: Any
    maker: LayerMaker
    names: FileNames


def _kind(module: nn.Module) -> Callable[[_Place], nn.Module] | None:
    """What makes the module that can stand where this one does; None where it holds no experts."""
    own = {name: weight.dim() for name, weight in module.named_parameters(recurse=False)}
    inner = dict(module.named_parameters())
    takes = len(signature(module.forward).parameters)
    if own.get("down_proj") == 3 and 3 in (own.get("gate_up_proj"), own.get("up_proj")):
        return {1: _padded, 3: _grouped}.get(takes)
    if {"mlp.w1", "mlp.v1", "mlp.w2"} <= inner.keys() and takes == 3:
        return _dbrx
    if own.get("weight") == 3 and takes == 2 and not isinstance(module, nn.modules.conv._ConvNd):
        return _sorted
    return None


def _grouped(place: _Place) -> nn.Module:
    maker, before = replace(place.maker, experts=True), len(place.maker.records)
    place = replace(place, maker=maker)
    ups, downs = _layers(place, transposed=bool(getattr(place.module, "is_transposed", False)))
    routed = place.module.num_experts if hasattr(place.module, "num_experts") else len(downs)
    grouped = group(ups, downs, maker.device) if routed == len(downs) else None
    if grouped is not None:
        maker.records[before:] = [
            replace(record, kernel=grouped.kernel.NAME) for record in maker.records[before:]
        ]
    return GroupedExperts(ups, downs, _activation(place.module), grouped)


def _padded(place: _Place) -> nn.Module:
    ups, downs = _layers(place, transposed=True)
    return PaddedExperts(ups, downs, _activation(place.module))


def _sorted(place: _Place) -> nn.Module:
    count, *sides = place.module.weight.shape
    transposed = hasattr(place.module, "in_features")
    rows, columns = reversed(sides) if transposed else sides
    stored = place.names.tensor(f"{place.name}.weight")
    if place.maker.source.has(stored):
        made = place.maker.stacked(stored, count, (rows, columns), transposed=transposed)
    else:
        made = [_one_by_one(place, number, (rows, columns)) for number in range(count)]
    return SortedExperts(made)


def _one_by_one(place: _Place, number: int, shape: tuple[int, int]) -> nn.Module:
    """The layer of one expert, of a tensor that the checkpoint has taken apart."""
    fused = fused_layer(place.name)
    block = replace(place, name=fused.block if fused else place.name)
    if fused and len(fused.leaves) > 1:
        return _first(block, number, shape, has_gate=True, biased=False, mixed=False)
    return place.maker.linear(_named(block, number, _DOWN), shape)


def _dbrx(place: _Place) -> nn.Module:
    """Three 2-D tensors, the experts one below the other; the third is used the other way round."""
    module = place.module
    count, rows, columns = module.num_experts, module.ffn_hidden_size, module.hidden_size
    w1, v1, w2 = (
        place.maker.tensor(place.names.tensor(f"{place.name}.mlp.{leaf}"), (count * rows, columns))
        for leaf in ("w1", "v1", "w2")
    )
    ups = [
        PlainLinear(torch.cat((gate, up)), None)
        for gate, up in zip(torch.split(w1, rows), torch.split(v1, rows), strict=True)
    ]
    downs = [PlainLinear(down.T.contiguous(), None) for down in torch.split(w2, rows)]
    return GroupedExperts(ups, downs, _gated(module.mlp.activation_fn))


def _layers(place: _Place, *, transposed: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    """First and second layer of every expert."""
    module, has_gate = place.module, getattr(place.module, "has_gate", True)
    first = "gate_up_proj" if has_gate else "up_proj"
    biased = bool(getattr(module, "has_bias", False))
    count = module.down_proj.shape[0]
    up, down = (
        tuple(reversed(one.shape[1:])) if transposed else tuple(one.shape[1:])
        for one in (getattr(module, first), module.down_proj)
    )
    ups = _stacked(place, first, count, up, transposed)
    if ups is None:
        interleaved = not getattr(module, "is_concatenated", True)
        ups = [_first(place, number, up, has_gate, biased, interleaved) for number in range(count)]
        for number in range(count, len(getattr(module, first))):  # LongCat's zero experts
            for leaf in (*_GATE, *_UP):
                place.maker.source.leave(place.names.module(f"{place.name}.{number}.{leaf}"))
    downs = _stacked(place, "down_proj", count, down, transposed)
    if downs is None:
        downs = [
            place.maker.linear(_named(place, number, _DOWN), down, biased)
            for number in range(count)
        ]
    return ups, downs


def _stacked(
    place: _Place, leaf: str, count: int, shape: tuple[int, int], transposed: bool
) -> list[nn.Module] | None:
    """The layers of a 3-D tensor; None where the checkpoint has the experts one by one."""
    name = f"{place.name}.{leaf}"
    held = place.names.module(name)
    if held not in place.maker.source.layers:
        if name not in place.names.tensors:
            return None
        held = place.names.tensor(name)
    bias = f"{name}_bias" if getattr(place.module, "has_bias", False) else None
    stored = place.names.tensor(bias) if bias else None
    return place.maker.stacked(held, count, shape, transposed=transposed, bias=stored)


def _first(
    place: _Place, number: int, shape: tuple[int, int], has_gate: bool, biased: bool, mixed: bool
) -> nn.Module:
    maker, one = place.maker, f"{place.name}.{number}"
    if not has_gate:
        return maker.linear(_named(place, number, _UP), shape, biased)
    if f"{one}.gate_up_proj" in place.names.modules:
        return maker.linear(place.names.module(f"{one}.gate_up_proj"), shape, biased)
    half = (shape[0] // 2, shape[1])
    pair = [_named(place, number, leaves) for leaves in (_GATE, _UP)]
    both = maker.merged(pair, [half, half], biased)
    return Interleaved(both) if mixed else both


def _named(place: _Place, number: int, leaves: tuple[str, ...]) -> str:
    """The file's name of one expert's layer, by whichever of its names the file has."""
    known = [f"{place.name}.{number}.{leaf}" for leaf in leaves]
    held = next((name for name in known if name in place.names.modules), known[0])
    return place.names.module(held)


class Interleaved(nn.Module):
    """Gate and up side by side, as rows that alternate (GPT-OSS)."""

    def __init__(self, both: nn.Module) -> None:
        super().__init__()
        self.both = both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.both(x).chunk(2, dim=-1), dim=-1).flatten(-2)


def _activation(module: Any) -> Activation:
    """What Transformers' module does between the layers of an expert."""
    if not getattr(module, "has_gate", True):
        return module.act_fn  # type: ignore[no-any-return]
    own = getattr(module, "_apply_gate", None)
    if own is None or own.__module__ != type(module).__module__:  # Transformers' default
        return _gated(module.act_fn)
    return own  # type: ignore[no-any-return]


def _gated(function: Activation) -> Activation:
    if function is silu or type(function).__name__ in ("SiLU", "SiLUActivation"):
        return silu_mul

    def activate(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return function(gate) * up

    return activate
