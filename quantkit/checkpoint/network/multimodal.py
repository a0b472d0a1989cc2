"""Which modules of a multi-modal model are its language model's, by structure and not by name.

Towers, projectors and adapters have names of their own in every family. The language model is known
by its embedding, which has a row a word, and by the numbered blocks that lie nearest to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from quantkit.checkpoint.network.config import text_size
from quantkit.checkpoint.network.language import text_config

_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in", "embeddings",
     "embedding", "shared"}
)  # fmt: skip
_NUMBERED = re.compile(r"(.+?)\.(\d+)\.")


@dataclass(frozen=True)
class LanguageModel:
    """blocks: what the names of all decoder blocks start with (`model.text_model.layers.`);
    parents: the modules in which the embedding, the final norm and the like lie directly."""

    blocks: str
    parents: frozenset[str]

    def beside(self, name: str) -> bool:
        """Whether a module lies directly where the blocks or the embedding do."""
        return _parent(name) in self.parents


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of more than a language model."""
    towers = (f"{kind}_config" for kind in ("vision", "audio", "speech", "thinker"))
    return text_config(config) is not config or any(isinstance(config.get(t), dict) for t in towers)


def language_model(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> LanguageModel | None:
    """Where the language model of a multi-modal model lies among its tensors (name → shape); None
    for a model that is nothing else, and where no embedding or no block is found."""
    if not is_multimodal(config):
        return None
    embedding = _embedding(shapes, config)
    stacks: dict[str, list[int]] = {}
    for name in shapes:
        if found := _NUMBERED.match(name):
            stacks.setdefault(found.group(1), []).append(int(found.group(2)))
    if embedding is None or not stacks:
        return None
    blocks = set(range(text_size(config, "num_hidden_layers")))

    def farness(prefix: str) -> tuple[int, bool, int, int]:
        numbers = stacks[prefix]
        near, whole = _shared(prefix, embedding), blocks.issubset(numbers)
        return -near, not whole, prefix.count("."), -len(numbers)

    stack = min(stacks, key=farness)
    return LanguageModel(f"{stack}.", frozenset({_parent(stack), _parent(embedding)}))


def _embedding(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str | None:
    """The module of the word embedding: of the config's size, or else the one with most rows."""
    wanted = (text_size(config, "vocab_size"), text_size(config, "hidden_size"))
    known = dict(_tables(shapes))
    exact = [name for name, shape in known.items() if shape == wanted]
    return exact[0] if exact else max(known, key=lambda name: known[name][0], default=None)


def _tables(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for tensor, shape in shapes.items():
        name = tensor.removesuffix(".weight")
        if len(shape) == 2 and name != tensor and name.rpartition(".")[2] in _EMBEDDINGS:
            yield name, shape


def _shared(one: str, other: str) -> int:
    """How many leading parts two names have in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
