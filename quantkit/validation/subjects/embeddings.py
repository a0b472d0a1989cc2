"""What pictures become: the embeddings that a model with towers gives to its language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COLUMNS = 64


@dataclass
class Embeddings:
    """`seen` [tokens, hidden] of the last forward pass of one row; None where the language model
    of a family is not called with embeddings."""

    seen: torch.Tensor | None = None

    def sketch(self) -> torch.Tensor | None:
        """`seen` times a fixed matrix of signs, float32 [tokens, COLUMNS] on the CPU: squares of
        differences keep their size on average, and a baseline's take little room in the cache."""
        import torch

        if self.seen is None:
            return None
        width = self.seen.shape[-1]
        dice = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (width, COLUMNS), generator=dice).float() * 2 - 1
        made: torch.Tensor = self.seen.float().cpu() @ signs / COLUMNS**0.5
        return made


@contextmanager
def watch_embeddings(model: Any) -> Iterator[Embeddings]:
    """Note what Transformers' model gives its language model inside the block."""
    found = Embeddings()

    def note(_module: Any, _args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = named.get("inputs_embeds")
        found.seen = None if given is None else given[0]

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
