"""Speed and memory of a loaded model: what its generation shows to a clock, warm-up discarded."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from quantkit.checkpoint.network.config import positions
from quantkit.checkpoint.progress import Progress
from quantkit.validation.subjects.base import Spread, Throughput, ThroughputRow

if TYPE_CHECKING:
    import torch

    from quantkit.runtime.model import Runtime

BATCHES = (1, 8)
PROMPT_TOKENS = 256
NEW_TOKENS = 32
REPEATS = 3
_SEED = 0


class Clock:
    """A streamer that notes when the prompts and every step's tokens were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
        self.times.append(perf_counter())

    def end(self) -> None:
        """Nothing is left to be written."""

    @property
    def first(self) -> float:
        """Seconds from the prompts to the first token."""
        return self.times[1] - self.times[0]

    @property
    def rest(self) -> float:
        """Seconds from the first token to the last."""
        return self.times[-1] - self.times[1]


def measure(
    runtime: Runtime,
    *,
    load_seconds: float,
    batches: Sequence[int] = BATCHES,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    progress: Progress | None = None,
) -> Throughput:
    """Greedy generation from random prompts, `repeats` times at each batch size.

    Each batch size is run once before it is measured. `new_tokens` are at least 2: the first one
    ends the prefill, the others are decoding. `load_seconds` is what the caller measured. A network
    of fewer positions is given shorter prompts.
    """
    prompt_tokens, new_tokens = fitting(
        prompt_tokens, new_tokens, positions(runtime.config.to_dict())
    )
    assert new_tokens > 1
    done, total = 0, len(batches) * (repeats + 1)
    rows = []
    for batch in batches:
        clocks = []
        for _ in range(repeats + 1):
            clocks.append(_generate(runtime, batch, prompt_tokens, new_tokens))
            done += 1
            if progress:
                progress(done, total)
        first = [clock.first for clock in clocks[1:]]
        rest = [clock.rest for clock in clocks[1:]]
        rows.append(row(batch, prompt_tokens, new_tokens, first, rest))
    return Throughput(load_seconds, runtime.memory_bytes, rows)


def fitting(prompt_tokens: int, new_tokens: int, longest: int | None) -> tuple[int, int]:
    """Tokens of a prompt and of its answer, cut to what `longest` positions hold together."""
    if longest is None or prompt_tokens + new_tokens <= longest:
        return prompt_tokens, new_tokens
    new_tokens = max(2, min(new_tokens, longest // 2))
    return max(1, longest - new_tokens), new_tokens


def row(
    batch: int, prompt_tokens: int, new_tokens: int, first: Sequence[float], rest: Sequence[float]
) -> ThroughputRow:
    """The row of repeated runs: seconds up to the first token, and from there to the last."""
    return ThroughputRow(
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_s=_spread([batch * prompt_tokens / seconds for seconds in first]),
        decode_tokens_s=_spread([batch * (new_tokens - 1) / seconds for seconds in rest]),
        first_token_s=_spread(first),
    )


def _generate(runtime: Runtime, batch: int, prompt_tokens: int, new_tokens: int) -> Clock:
    import torch

    vocabulary = runtime.network.embed.shape[0]
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator)
    clock = Clock()
    runtime.generate(
        ids.to(runtime.device), max_new_tokens=new_tokens, eos_token_id=[], streamer=clock
    )
    return clock


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))
