"""Fused expert tensors: [experts, in, out] or [experts, out, in]?"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.language import text_config
from quantkit.errors import InputError

_UP = ("gate_up_proj", "up_proj", "gate_proj", "input_linear", "fc1")
_DOWN = ("down_proj", "output_linear", "fc2")


def input_first(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], name: str, packed: int = 1
) -> bool | None:
    """Whether the fused expert tensor `name` holds each expert as [in, out]; None: nothing tells.

    The hidden size tells where the tensor has it in one of the two readings alone, else the same of
    another tensor of these experts in `shapes` (name → shape), which are stored alike; then the
    family. `packed` codes of the input share an element of these tensors.
    """
    hidden = text_config(config).get("hidden_size")
    suffix = ".weight" if name.endswith(".weight") else ""
    parent, _, own = name.removesuffix(suffix).rpartition(".")
    for leaf in (own, *_DOWN, *_UP):
        shape = shapes.get(f"{parent}.{leaf}{suffix}", ())
        if len(shape) == 3:
            # Experts read the hidden state, and their last layer writes it.
            down = leaf in _DOWN
            last = (shape[1] if down else shape[2] * packed) == hidden
            first = (shape[2] if down else shape[1] * packed) == hidden
            if last != first:
                return first
    return family(config).experts.input_first


def held_input_first(
    name: str, shape: tuple[int, ...], checkpoint: Checkpoint, packed: int = 1
) -> bool:
    """Whether a fused tensor of this shape holds inputs first; where nothing tells, it is taken as
    it lies (`verify` warns of that)."""
    shapes = ChainMap({name: shape}, checkpoint.shapes)
    return bool(input_first(shapes, checkpoint.config, name, packed))


def stored_transposed(tensor: TensorInfo, checkpoint: Checkpoint) -> bool:
    """Whether a fused expert tensor holds experts as [in, out]; InputError when nothing tells."""
    found = input_first(checkpoint.shapes, checkpoint.config, tensor.name)
    if found is None:
        hidden = text_config(checkpoint.config).get("hidden_size")
        what = f"does not show which dimension is the input (the hidden size is {hidden})"
        raise unknown_experts(tensor, what)
    return found


def unknown_experts(tensor: TensorInfo, what: str) -> InputError:
    """The refusal of fused experts that do not say how they are stored."""
    block = ".".join(tensor.name.removesuffix(".weight").split(".")[-3:-1])
    return InputError(
        f"{tensor.name} {list(tensor.shape)} {what}.",
        hint=f"keep the experts in 16 bit: --set 'ignore+=re:.*{block}.*'",
        code="stream.expert_layout",
    )


def upright(name: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape with output before input, also of a fused expert tensor stored the other way."""
    if len(shape) == 3 and held_input_first(name, shape, checkpoint):
        return (shape[0], shape[2], shape[1])
    return shape
