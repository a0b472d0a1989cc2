"""What a plan does as asked, and the user may not expect: said, not refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from quantkit.backends.registry import Backend
from quantkit.backends.registry.towers import untried_towers
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.config import expert_count, missing_head
from quantkit.checkpoint.network.multimodal import is_multimodal
from quantkit.formats.registry import is_quantized


def notes_of(checkpoint: Checkpoint, backend: Backend, layers: Collection[str]) -> list[str]:
    """In words: a source that is quantized itself, most of the model left in 16 bit, experts that
    stay, a head that is nowhere, towers of a family that the library was not tried with."""
    found = is_quantized(checkpoint)
    itself = (
        [f"the source is quantized itself ({found}): its rounding stays in it"] if found else []
    )
    return [
        *itself,
        *_left_in_16_bit(checkpoint, layers),
        *_head_notes(checkpoint),
        *_tower_notes(checkpoint, backend),
    ]


def _left_in_16_bit(checkpoint: Checkpoint, layers: Collection[str]) -> Iterator[str]:
    modules = checkpoint.modules
    replaced = {module.tensor for module in modules if module.name in layers}
    left = sum(info.bytes for info in checkpoint.tensors.values() if info.name not in replaced)
    if 2 * left > checkpoint.weight_bytes:
        yield f"{100 * left // checkpoint.weight_bytes} % of the model's bytes stay in 16 bit"
    experts = [m.name for m in modules if m.kind == "experts" or ".experts." in m.name]
    experts = experts or [name for name in checkpoint.tensors if ".experts." in name]
    count = expert_count(checkpoint.config)
    if count and not experts:
        yield f"config.json states {count} experts a layer, and no tensor is one by name"
    elif experts and not set(layers) & set(experts):
        yield f"all experts stay in 16 bit ({experts[0]} is the first)"


def _head_notes(checkpoint: Checkpoint) -> Iterator[str]:
    has_head = any(module.kind == "head" for module in checkpoint.modules)
    if note := missing_head(checkpoint.config, has_head):
        yield note


def _tower_notes(checkpoint: Checkpoint, backend: Backend) -> Iterator[str]:
    untried = is_multimodal(checkpoint.config) and untried_towers(backend, checkpoint.config)
    if untried:
        yield untried
