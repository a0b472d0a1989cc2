"""What a config promises of towers and projectors, told by names and shapes alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantkit.checkpoint.network.config import text_size
from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.network.multimodal import language_model
from quantkit.verification.findings import Finding, error

_TOWERS = ("vision_config", "audio_config")
_DEPTHS = ("num_hidden_layers", "depth", "vt_num_hidden_layers")
_NUMBERED = re.compile(r"(.+?)\.(\d+)(?:\.|$)")
_COPY = "copy towers and projectors from the source in 16 bit"


def check_towers(
    modules: Iterable[Module], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Errors `complete.no_tower`, `complete.missing_tower_layer` and `complete.no_projector`, the
    last two of vision towers in 16 bit; `shapes` are those of all tensors.

    What a picture becomes has the language model's width, which some tensor outside of its blocks
    must have, its tables of words aside.
    """
    promised = [key for key in _TOWERS if config.get(key)]
    outside = [module for module in modules if module.kind == "tower"]
    if promised and not outside:
        yield error(
            "complete.no_tower",
            f"config.json has a {promised[0]}; the checkpoint has no tensor outside of the "
            "language model",
            _COPY,
        )
        return
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return
    depth = next((vision[key] for key in _DEPTHS if isinstance(vision.get(key), int)), 0)
    deepest = _deepest(module.name for module in outside)
    if deepest < depth:
        yield error(
            "complete.missing_tower_layer",
            f"config.json says {depth} layers of the vision tower; the checkpoint has {deepest}",
            _COPY,
        )
    language = language_model(shapes, config)
    hidden, words = (text_size(config, key) for key in ("hidden_size", "vocab_size"))
    if language is None or not hidden:
        return
    wide = (
        name
        for name, shape in shapes.items()
        if hidden in shape and len(shape) > 1 and words not in shape
    )
    if all(name.startswith(language.blocks) for name in wide):
        yield error(
            "complete.no_projector",
            "no weight outside of the language model has its width, "
            f"{hidden}: what makes embeddings of pictures is not there",
            _COPY,
        )


def _deepest(names: Iterable[str]) -> int:
    """How many numbered blocks the largest stack has."""
    stacks: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if found := _NUMBERED.match(name):
            stacks[found.group(1)].add(found.group(2))
    return max(map(len, stacks.values()), default=0)
