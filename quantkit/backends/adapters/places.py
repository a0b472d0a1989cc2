"""Where the layers of a plan lie in the model that Transformers builds.

A plan names layers as the checkpoint does. Transformers renames some of them and holds the experts
of a layer as two 3-D tensors; its own conversion mapping, which loads the weights, tells both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from quantkit.backends.process.job import Job, JobInputError
from quantkit.checkpoint.network.fused_experts import fused_layer

HALVES = ("gate_proj", "up_proj")
"""What the two halves of a fused `gate_up_proj` are called as layers of their own."""

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """A module of the model, or a part of a fused expert tensor `parameter` of that module.

    expert: None where the checkpoint holds the fused tensor too, and the layer is all its experts.
    part: what the layer of one expert is called where experts are modules of their own; "" with a
        fused layer.
    """

    module: str
    parameter: str = ""
    expert: int | None = None
    part: str = ""


def locate(model: Any, job: Job) -> dict[str, Place]:
    """The place of every layer of the plan; JobInputError for layers that the model has not."""
    found = places(model, job.layers)
    absent = sorted(set(job.layers) - set(found))
    if absent:
        raise JobInputError(
            f"{len(absent)} modules of the plan are not in the model that Transformers builds from "
            f"{job.model}: {absent[:3]}.",
            hint="put them on the recipe's ignore list",
            code="worker.layers_absent",
        )
    return found


def places(model: Any, layers: Iterable[str]) -> dict[str, Place]:
    """The places of those layers, by their names in the checkpoint, that the model has."""
    conversions = get_model_conversion_mapping(model)
    merging = [c for c in conversions if isinstance(c, WeightConverter)]
    renaming: list[Any] = [c for c in conversions if not isinstance(c, WeightConverter)]
    state = model.state_dict()
    found: dict[str, Place] = {}
    for layer in layers:
        for tensor in (f"{layer}.weight", layer):
            name, pattern = rename_source_key(
                tensor, renaming, merging, model.base_model_prefix, state
            )
            if name in state:
                place = _place(layer, name, state[name].ndim, _part(pattern, merging))
                found |= {layer: place} if place else {}
                break
    return found


def _place(layer: str, name: str, dimensions: int, part: str | None) -> Place | None:
    module, _, parameter = name.rpartition(".")
    if part is None:
        return Place(module) if parameter == "weight" else Place(module, parameter)
    index = _EXPERT.search(f".{layer}.")
    if index is None and dimensions == 3 and layer.rpartition(".")[2] == parameter:
        return Place(module, parameter)  # fused in the file too, and only turned around
    if index is None or dimensions != 3:
        return None  # merged in another way than experts are
    return Place(module, parameter, int(index.group(1)), part)


def _part(pattern: str | None, merging: Iterable[WeightConverter]) -> str | None:
    """The part of a fused tensor that a converter makes of the tensors of this pattern."""
    if pattern is None:
        return None
    converter = next(c for c in merging if pattern in c.source_patterns)
    leaf = str(converter.target_patterns[0]).rpartition(".")[2]
    return HALVES[converter.source_patterns.index(pattern)] if leaf == "gate_up_proj" else leaf


def separated(model: torch.nn.Module, found: Mapping[str, Place]) -> dict[str, dict[str, str]]:
    """Layer of the checkpoint → its linear layers in the model once every expert is a module of its
    own, each with its name in the checkpoint.

    `model` still holds the experts as 3-D tensors.
    """
    return {
        layer: dict(_apart(layer, place, model.get_submodule(place.module)))
        for layer, place in found.items()
    }


def _apart(layer: str, place: Place, module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    if not place.parameter:
        yield place.module, layer
    elif place.expert is not None:
        yield f"{place.module}.{place.expert}.{place.part}", layer
    else:
        fused = fused_layer(layer)
        whole = HALVES if place.parameter == "gate_up_proj" else (place.parameter,)
        assert fused is not None, layer
        # LongCat's last experts have rows in one tensor only, and compute nothing.
        counts = [t.shape[0] for t in module.parameters(recurse=False) if t.ndim == 3]
        for expert in range(min(counts)):
            for part, name in zip(whole, fused.names(expert), strict=True):
                yield f"{place.module}.{expert}.{part}", name


def fused_tensors(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Modules that hold experts as 3-D tensors → name of the tensor → how many experts."""
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        for leaf in ("gate_up_proj", "up_proj", "down_proj"):
            tensor = module.__dict__["_parameters"].get(leaf)
            if tensor is not None and tensor.ndim == 3:
                found.setdefault(name, {})[leaf] = tensor.shape[0]
    return found


def expert_blocks(found: Mapping[str, Place]) -> dict[str, str]:
    """Module that holds the experts of a layer → its name in the checkpoint."""
    blocks = {}
    for layer, place in found.items():
        if place.parameter:
            head, inside, _ = layer.partition(".experts.")
            held = f"{head}.experts" if inside else layer.rpartition(".")[0]
            # Granite's files have the layers of all experts beside the router.
            beside = place.module.endswith(".experts") and not held.endswith(".experts")
            blocks[place.module] = f"{held}.experts" if beside else held
    return blocks


def kept_layers(model: Any, job: Job) -> dict[str, Place]:
    """The places of the linear layers that stay in 16 bit; embeddings, which engines never
    quantize, and the positions of a tower are none."""
    return {
        name: place
        for name, place in places(model, job.keep).items()
        if not isinstance(model.get_submodule(place.module), torch.nn.Embedding)
        and not (place.parameter and place.expert is None and fused_layer(name) is None)
    }


def renamed_modules(found: Mapping[str, Place]) -> dict[str, str]:
    """Module of the model → its name in the checkpoint, where they differ."""
    pairs = ((place.module, name) for name, place in found.items() if not place.parameter)
    return {module: name for module, name in pairs if module != name}
