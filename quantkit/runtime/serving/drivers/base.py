"""What a driver is, and the order it gets (standard library only)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

Ids = Sequence[int]
VISIBLE = "CUDA_VISIBLE_DEVICES"
Tell = Callable[[int, int], None]
"""(steps done, steps in all)."""


@dataclass(frozen=True)
class EngineOrder:
    """The engine to start and the model to load.

    driver: `"module:attr"` of what makes a `Driver` of an order. device: as `--device`, resolved;
    of several ("cuda:0,1") a server's flag tells how many. stop: token ids that end an answer.
    length: the longest sequence that will be asked for. cache_bytes: what the KV cache of eight
    sequences of that length takes. flags: what a server would be given (`launch.flags_of`).
    packages: a folder of Python packages beside the engine's own. towers: whether the model takes
    more than text, for whose placeholders the engine wants a tokenizer. likeliest: tokens of a
    position that will be asked for at most.
    """

    driver: str
    model: str
    device: str
    stop: tuple[int, ...]
    length: int
    cache_bytes: int
    flags: dict[str, Any] = field(default_factory=dict)
    packages: str = ""
    towers: bool = False
    likeliest: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """The flags as the engine's Python interface names them."""
        return {flag[2:].replace("-", "_"): value for flag, value in self.flags.items()}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> EngineOrder:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def pin(device: str) -> None:
    """Show an engine that takes the first GPUs only those of "cuda:N" or "cuda:N,M", which count
    what CUDA_VISIBLE_DEVICES leaves; before its import."""
    if not device.startswith("cuda:"):
        return
    numbers, visible = device.removeprefix("cuda:").split(","), os.environ.get(VISIBLE)
    named = visible.split(",") if visible else []
    os.environ[VISIBLE] = ",".join(
        named[int(number)] if int(number) < len(named) else number for number in numbers
    )


class Driver(Protocol):
    """A loaded model in its engine. Prompts are token ids and are never tokenized again."""

    version: str

    def logprobs(self, windows: Sequence[Ids], tell: Tell) -> list[list[float]]:
        """Log-probability of every token but the first of each window."""
        ...

    def top_logprobs(self, windows: Sequence[Ids], count: int, file: str, tell: Tell) -> None:
        """The same, and the `count` likeliest tokens, into that file (`likeliest.py`)."""
        ...

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt, a stop token included."""
        ...

    def run(self, prompts: Sequence[Ids], new_tokens: int) -> None:
        """Generate exactly so many tokens for every prompt of one batch; for timing."""
        ...

    def kernels(self) -> dict[str, int]:
        """Kernel → how many linear modules of the engine it computes; empty when unknown."""
        ...

    def memory_bytes(self) -> int:
        """What the weights and buffers take; 0 when unknown."""
        ...

    def close(self) -> None:
        """Stop the engine's processes."""
        ...
