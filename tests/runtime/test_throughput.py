"""Throughput as `quantkit validate` reports it: every token is counted, the first run is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.backends.process.float32_products import slow_bfloat16
from quantkit.runtime.load import load
from quantkit.validation.subjects import throughput
from quantkit.validation.subjects.throughput import Clock, measure


def test_rates_are_tokens_over_the_seconds_of_each_phase(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, ticks = load(small_model), iter(range(10_000))
    monkeypatch.setattr(throughput, "perf_counter", lambda: next(ticks))
    steps: list[tuple[int, int]] = []
    found = measure(
        runtime, load_seconds=1.5, batches=(1, 3), prompt_tokens=20, new_tokens=5, repeats=2,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps == [(n, 6) for n in range(1, 7)]
    assert found.load_seconds == 1.5
    for row, batch in zip(found.rows, (1, 3), strict=True):
        assert (row.batch, row.prompt_tokens, row.new_tokens) == (batch, 20, 5)
        assert row.first_token_s.median == 1  # one tick from the prompts to the first token
        assert row.prefill_tokens_s.median == batch * 20
        assert row.decode_tokens_s.low == row.decode_tokens_s.high == batch  # a tick a step


def test_the_warm_up_is_discarded(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = iter([100.0, 1.0, 2.0, 4.0])

    def generate(*_: object) -> Clock:
        clock = Clock()
        clock.times = [0.0, next(slow), 1000.0]
        return clock

    monkeypatch.setattr(throughput, "_generate", generate)
    found = measure(load(small_model), load_seconds=0, batches=(1,), prompt_tokens=8, new_tokens=2)
    spread = found.rows[0].first_token_s
    assert (spread.low, spread.median, spread.high) == (1.0, 2.0, 4.0)


def test_memory_counts_each_weight_once(small_model: Path, artifact: Callable[[str], Path]) -> None:
    stored = sum(f.stat().st_size for f in small_model.glob("*.safetensors"))
    found = load(small_model, dtype="float32").memory_bytes
    assert found == pytest.approx(2 * stored, rel=0.01)  # float32; the head is the embedding
    path = artifact("llmcompressor/w4a16")
    quantized = load(path, kernel="reference").memory_bytes
    # Where the CPU multiplies bfloat16, the head lies in oneDNN's arrangement beside the embedding.
    head = 0 if slow_bfloat16() else 2 * 4096 * 576
    assert quantized == pytest.approx(
        sum(f.stat().st_size for f in path.glob("*.safetensors")) + head, rel=0.05
    )


def test_a_streamer_sees_the_prompts_and_every_step(small_model: Path) -> None:
    class Seen:
        def __init__(self) -> None:
            self.parts: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value)

        def end(self) -> None:
            self.parts.append(torch.empty(0))

    seen, ids = Seen(), torch.randint(3, 4096, (2, 7))
    whole = load(small_model).generate(ids, max_new_tokens=4, eos_token_id=[], streamer=seen)
    assert torch.equal(seen.parts[0], ids)
    assert torch.equal(torch.stack(seen.parts[1:-1], dim=1), whole[:, 7:])
    assert len(seen.parts) == 6
