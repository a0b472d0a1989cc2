"""The builtin runtime as a subject: what engines offer, and the full logits that KL needs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantkit import __version__
from quantkit.checkpoint.progress import Progress
from quantkit.validation.subjects.base import Opening, Throughput
from quantkit.validation.subjects.embeddings import watch_embeddings
from quantkit.validation.subjects.routing import Routes, watch_routers

if TYPE_CHECKING:
    import torch

    from quantkit.runtime.model import Runtime
    from quantkit.runtime.network.cache_rounding import CacheScales, CacheWatch
    from quantkit.runtime.network.generation import Sampling

BATCH_TOKENS = 2048
"""Tokens a forward pass: the logits of that many are the largest thing in memory."""


class Builtin:
    """A checkpoint in the builtin runtime."""

    name = "builtin"

    def __init__(self, runtime: Runtime, load_seconds: float) -> None:
        self.runtime = runtime
        self.load_seconds = load_seconds

    @property
    def version(self) -> str:
        notes = computing() if self.runtime.device.type == "cpu" else ""
        return f"{__version__} with {notes}" if notes else __version__

    @property
    def weights_only(self) -> bool:
        return self.runtime.weights_only

    @property
    def notes(self) -> list[str]:
        from quantkit.runtime.loading.make_layers import notes_as_served

        notes = notes_as_served(self.runtime.layers)
        scales = self.cache_scales.values()
        if scales and all(scale.keys == scale.values == 1 for scale in scales):
            notes.append(
                "every scale of the KV cache is 1, as engines take those that are not there"
            )
        return notes

    def logits(
        self, windows: NDArray[np.int64], last: int = 0
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Batches of windows [n, length] → (their rows, logits [rows, length, vocabulary]).

        With `last` only those of the last positions.
        """
        import torch

        step = max(1, BATCH_TOKENS // windows.shape[1])
        for start in range(0, len(windows), step):
            rows = slice(start, min(start + step, len(windows)))
            ids = torch.from_numpy(windows[rows]).to(self.runtime.device)
            yield rows, self.runtime(ids, logits_to_keep=last).logits

    def show(
        self, ids: Sequence[int], inputs: Mapping[str, NDArray[Any]], last: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [last, vocabulary] of the last positions of a conversation, and a sketch of the
        embeddings of all [n, columns]; `inputs` are what a processor made of its picture."""
        import torch

        row = torch.tensor(ids, device=self.runtime.device).unsqueeze(0)
        pictures = {name: torch.from_numpy(array) for name, array in inputs.items()}
        assert not self.runtime.lean
        with watch_embeddings(self.runtime.network.model) as embeddings:
            found = self.runtime(row, logits_to_keep=last, pictures=pictures)
        return found.logits[0], embeddings.sketch()

    def watch_routers(self) -> AbstractContextManager[Routes]:
        """Note which experts the routers choose while the block runs."""
        return watch_routers(self.runtime)

    @property
    def cache_scales(self) -> Mapping[int, CacheScales]:
        """Decoder layer → the scales of its quantized key-value cache; empty for one in 16 bit."""
        return self.runtime.cache_scales

    def cache_in_16_bit(self) -> AbstractContextManager[Mapping[int, CacheWatch]]:
        """Compute without rounding the cache inside the block; layer → what it held."""
        return self.runtime.cache_in_16_bit()

    def logprobs(
        self, windows: NDArray[np.int64], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        import torch

        result = np.empty((len(windows), windows.shape[1] - 1), dtype=np.float32)
        for rows, logits in self.logits(windows):
            following = torch.from_numpy(windows[rows, 1:]).to(logits.device)
            result[rows] = next_logprobs(logits[:, :-1], following).cpu().numpy()
            if progress:
                progress(rows.stop, len(windows))
        return result

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        from quantkit.runtime.network.generation import Sampling

        return self.sample(prompts, new_tokens, Sampling())

    def sample(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        import torch

        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.runtime.device
        whole = self.runtime.generate(
            ids.to(device),
            mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=sampling.sample,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        return [_until_stop(row, self.runtime.stop_tokens) for row in whole[:, width:].tolist()]

    def throughput(self, progress: Progress | None = None) -> Throughput:
        from quantkit.validation.subjects.throughput import measure

        return measure(self.runtime, load_seconds=self.load_seconds, progress=progress)

    def kernels(self) -> dict[str, int]:
        return self.runtime.kernels()

    def close(self) -> None:
        del self.runtime


def open_builtin(path: Path, opening: Opening) -> Builtin:
    """Load a checkpoint directory with the builtin runtime; raises what `runtime.load` raises."""
    from quantkit.runtime.load import load

    start = time.monotonic()
    runtime = load(
        path,
        device=opening.device,
        kernel=opening.kernel,
        as_on=opening.as_on,
        online=opening.online,
        progress=opening.progress,
    )
    return Builtin(runtime, time.monotonic() - start)


def open_rounded(path: Path, like: Path, opening: Opening) -> Builtin:
    """The 16-bit model of `path` with the layers of the checkpoint `like` rounded to nearest;
    raises what `runtime.load_rounded` raises."""
    from quantkit.runtime.load import load_rounded

    start = time.monotonic()
    runtime = load_rounded(
        path,
        like,
        device=opening.device,
        kernel=opening.kernel,
        as_on=opening.as_on,
        progress=opening.progress,
    )
    return Builtin(runtime, time.monotonic() - start)


def refuse_builtin(path: Path, opening: Opening) -> None:
    """Raise what `open_builtin` would raise, as far as headers and config tell."""
    from quantkit.runtime.load import open_path, pick_devices, rounded_layers
    from quantkit.runtime.preview import refuse

    if opening.online is not None:
        rounded_layers(open_path(path), opening.online)
    refuse(path, pick_devices(opening.device), opening.kernel, opening.as_on)


def has_vllm_operators() -> bool:
    """Whether the runtime computes with vLLM's operators on a CPU, which round otherwise."""
    from quantkit.runtime.vllm_ops.cpu import missing

    return missing() is None


def computing() -> str:
    """In words, what makes the runtime's numbers on this CPU unlike those on another."""
    from quantkit.backends.process.float32_products import described

    operators = "vLLM's CPU operators" if has_vllm_operators() else ""
    products = f"bfloat16 products in {described()}" if described() else ""
    return ", ".join(filter(None, (operators, products)))


def next_logprobs(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Logits [..., vocabulary] and ids [...] → log-probability of each id, float32 [...]."""
    scores = logits.float()
    chosen = scores.gather(-1, following.unsqueeze(-1)).squeeze(-1)
    return chosen - scores.logsumexp(-1)


def _until_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    """Up to and with the first stop token; what follows it is padding."""
    end = next((index + 1 for index, token in enumerate(ids) if token in stop), len(ids))
    return ids[:end]
