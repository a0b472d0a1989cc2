"""A model under test: what validation asks of an engine, and the builtin runtime as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.progress import Progress
from quantkit.engines.online import Online

TOP = 256
"""Likeliest tokens that are kept of a distribution."""


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the lowest and highest of them."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class ThroughputRow:
    """Speed at one batch size: prompts of `prompt_tokens`, then `new_tokens` each.

    Rates count the tokens of the whole batch; `first_token_s` is the time to the first new token.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_s: Spread
    decode_tokens_s: Spread
    first_token_s: Spread


@dataclass(frozen=True)
class Throughput:
    """How fast one loaded model is; `memory_bytes` is what its weights and buffers take."""

    load_seconds: float
    memory_bytes: int
    rows: list[ThroughputRow]


class Subject(Protocol):
    """One loaded model; an engine becomes testable by offering this.

    name: the engine ("builtin", "vllm", …). version: the engine's, as reports state it.
    weights_only: whether activations that the scheme quantizes are computed in 16 bit, though what
        serves it would round them.
    notes: sentences for the report on how it computes.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def weights_only(self) -> bool: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def logprobs(
        self, windows: NDArray[np.int64], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Token ids [n, length] → the log-probability of every next token, [n, length - 1]."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt, new ids only, a stop token included."""
        ...

    def throughput(self, progress: Progress | None = None) -> Throughput:
        """Load time, memory and rates; the warm-up is not counted."""
        ...

    def kernels(self) -> dict[str, int]:
        """Kernel → how many modules it computes; empty when the engine does not say."""
        ...

    def close(self) -> None:
        """Give back memory and processes; the subject is not used again."""
        ...


@dataclass(frozen=True)
class TopLogprobs:
    """What an engine says of windows [n, length]: of every next token its log-probability, float32
    [n, length - 1], and the likeliest tokens, int32 ids and float32 log-probabilities
    [n, length - 1, k], the first one first."""

    logprobs: NDArray[np.float32]
    ids: NDArray[np.int32]
    kept: NDArray[np.float32]


@runtime_checkable
class WithTopLogprobs(Protocol):
    """A subject that tells the likeliest tokens of each distribution, and no logits."""

    def top_logprobs(
        self, windows: NDArray[np.int64], progress: Progress | None = None
    ) -> TopLogprobs:
        """Of token ids [n, length]; `TOP` tokens, or as many as the vocabulary has."""
        ...


@dataclass(frozen=True)
class Opening:
    """How a subject is to be opened; device, kernel and as_on are as on the command line.

    `online` rounds a 16-bit checkpoint while it loads.
    """

    device: str = "auto"
    kernel: str = "auto"
    as_on: str = ""
    progress: Progress | None = field(default=None, compare=False)
    online: Online | None = None


Opener = Callable[[Path, Opening], Subject]
"""Loads a checkpoint directory; InputError when it is inconsistent, BackendError when the engine
fails."""
