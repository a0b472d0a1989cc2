"""Token by token: one prefill, then decoding with a static cache; greedy or sampled, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quantkit.errors import InputError

Forward = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""New ids [batch, n] and the mask of all positions so far → logits of the last one."""


class Streamer(Protocol):
    """What follows a generation as it goes, as Transformers' streamers do."""

    def put(self, value: torch.Tensor) -> None:
        """The prompts [batch, n] first, then the ids [batch] of every step."""

    def end(self) -> None:
        """No more will come."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken: the most likely, or drawn from the `temperature`d rest.

    `top_k` and `top_p` leave the k most likely tokens, and the fewest that hold probability p.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sample and (self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0):
            raise InputError(
                f"Cannot sample with temperature {self.temperature:g}, top_k {self.top_k} and "
                f"top_p {self.top_p:g}.",
                hint="temperature > 0, top_k >= 0, 0 < top_p <= 1",
                code="runtime.sampling",
            )


def generate(
    forward: Forward,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    new_tokens: int,
    stop: Sequence[int],
    padding: int,
    sampling: Sampling,
    streamer: Streamer | None = None,
) -> torch.Tensor:
    """Continue prompts ids [batch, n], padded on the left; [batch, n + at most new_tokens].

    A sequence ends with the first of the `stop` tokens and is then filled with `padding`. The
    `streamer` gets what Transformers gives one: the prompts, then each step's ids, on the CPU.
    """
    if streamer is not None:
        streamer.put(ids.cpu())
    pick = _picker(sampling, ids.device)
    stops = torch.tensor(list(stop), device=ids.device, dtype=ids.dtype)
    running = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    result = [ids]
    step = ids
    for index in range(new_tokens):
        chosen = pick(forward(step, attention_mask)[:, -1])
        chosen = torch.where(running, chosen, padding)
        step = chosen.unsqueeze(1)
        result.append(step)
        if streamer is not None:
            streamer.put(chosen.cpu())
        if stops.numel():
            running &= ~torch.isin(chosen, stops)
            if index + 1 < new_tokens and not bool(running.any()):
                break
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(step.shape)), 1)
    if streamer is not None:
        streamer.end()
    return torch.cat(result, dim=1)


def _picker(sampling: Sampling, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits [batch, vocabulary] → the next ids [batch]."""
    if not sampling.sample:  # on a CPU, argmax of 16-bit numbers takes five times as long
        return lambda logits: logits.max(-1).indices
    generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def pick(logits: torch.Tensor) -> torch.Tensor:
        scores = logits.float() / sampling.temperature
        if sampling.top_k or sampling.top_p < 1:
            ordered, order = scores.sort(descending=True, stable=True)
            if sampling.top_k:
                ordered[:, sampling.top_k :] = -torch.inf
            share = ordered.softmax(-1)
            ordered.masked_fill_(share.cumsum(-1) - share >= sampling.top_p, -torch.inf)
            scores = scores.scatter(-1, order, ordered)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)

    return pick
