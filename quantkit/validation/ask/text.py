"""What a model says of a text, token by token: log-likelihoods, and KL against the baseline.

Of the baseline's distribution P only `TOP + TAIL` tokens are kept, so that it can be cached: the
`TOP` likeliest, and `TAIL` drawn from the rest R, of mass r. The sum over vocabulary that is
KL(P‖Q) is then the exact sum over the first, plus r times the mean of log P/Q over the drawn ones,
which is an unbiased estimate of the sum over R (importance sampling). Where Q is P it is 0 exactly.

Its noise would inflate the KL of single tokens, and with it their percentiles. So a control
variate takes most of it away: over R the mean of (Q/s)/(P/r) is 1, s being Q's mass of R, and what
the drawn ones deviate from it goes the other way than their log P/Q. How much of it is added
depends on the first tokens alone, which leaves the estimate unbiased: all of it for small gaps
(then it is the k3 of Schulman 2020, http://joschu.net/blog/kl-approx.html), less for wide ones.

An engine that tells only its likeliest tokens is estimated by `likeliest.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.progress import Progress
from quantkit.validation.ask import likeliest
from quantkit.validation.subjects.base import TOP, Subject, TopLogprobs, WithTopLogprobs
from quantkit.validation.subjects.routing import Routes

if TYPE_CHECKING:
    import torch

TAIL = 64
LEAST_MASS = 1e-4
"""Masses under it are differences of float32 sums that say little."""
CHUNK = 256
"""Tokens whose logits are in float32 at one time."""


@runtime_checkable
class WithLogits(Protocol):
    """A subject that gives all logits, as KL and top-1 agreement need them."""

    def logits(
        self, windows: NDArray[np.int64], last: int = 0
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Batches of windows [n, length] → (their rows, logits [rows, length, vocabulary]).

        With `last` only those of the last positions.
        """
        ...

    def watch_routers(self) -> AbstractContextManager[Routes]:
        """Note which experts the routers choose while the block runs."""
        ...


@dataclass(frozen=True)
class BaselineText:
    """The baseline on windows [n, length]; all arrays have length - 1 predictions a window.

    logprobs: float32 [n, length - 1], of the token that follows. first: int64, the likeliest
    token. ids, kept: tokens and their log-probabilities [n, length - 1, TOP + TAIL]. experts: those
    that compute each token, [layers, n, length, k], of a mixture. Of an engine that gives no logits
    nothing is drawn: `ids` and `kept` are its likeliest tokens, or only `logprobs` is there.
    """

    logprobs: NDArray[np.float32]
    first: NDArray[np.int64] | None = None
    ids: NDArray[np.int32] | None = None
    kept: NDArray[np.float32] | None = None
    experts: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class QuantizedText:
    """The quantized model on the same windows: `kl` in nats, `agrees` (same first token), and of a
    mixture by decoder layer whether the same experts compute a token, [n, length]. `bounds` are
    the least and the most that `kl` may be, where it was estimated from the likeliest tokens."""

    logprobs: NDArray[np.float32]
    kl: NDArray[np.float32] | None = None
    agrees: NDArray[np.bool_] | None = None
    bounds: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    routed: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict)


def measure_baseline(
    subject: Subject, windows: NDArray[np.int64], progress: Progress | None
) -> BaselineText:
    """Run the baseline over the windows."""
    import torch

    if isinstance(subject, WithTopLogprobs):
        said = subject.top_logprobs(windows, progress)
        return BaselineText(said.logprobs, said.ids[..., 0].astype(np.int64), said.ids, said.kept)
    if not isinstance(subject, WithLogits):
        return BaselineText(subject.logprobs(windows, progress))
    logprobs = torch.empty(len(windows), windows.shape[1] - 1)
    first = torch.empty(logprobs.shape, dtype=torch.int64)
    kept_ids: torch.Tensor | None = None
    kept = torch.empty(0)
    dice: torch.Generator | None = None
    with subject.watch_routers() as routes:
        for place, scores, following in _chunks(subject, windows, progress):
            if kept_ids is None or dice is None:
                count = TOP + TAIL if scores.shape[-1] > TOP else scores.shape[-1]
                kept_ids = torch.empty(*logprobs.shape, count, dtype=torch.int32)
                kept = torch.empty(*logprobs.shape, count)
                dice = torch.Generator(scores.device).manual_seed(0)
            scores = scores.log_softmax(-1)
            logprobs[place] = scores.gather(-1, following).squeeze(-1).cpu()
            first[place] = scores.argmax(-1).cpu()
            ids = keep(scores, dice)
            kept_ids[place] = ids.to(torch.int32).cpu()
            kept[place] = scores.gather(-1, ids).cpu()
    assert kept_ids is not None
    return BaselineText(
        logprobs.numpy(), first.numpy(), kept_ids.numpy(), kept.numpy(), routes.table(windows)
    )


def measure_quantized(
    subject: Subject,
    windows: NDArray[np.int64],
    baseline: BaselineText,
    progress: Progress | None,
) -> QuantizedText:
    """Run the quantized model over the windows, against what the baseline said of them."""
    import torch

    if isinstance(subject, WithTopLogprobs) and baseline.ids is not None:
        return _of_likeliest(subject.top_logprobs(windows, progress), baseline)
    if not isinstance(subject, WithLogits) or baseline.ids is None:
        return QuantizedText(subject.logprobs(windows, progress))
    kept_ids, kept = torch.from_numpy(baseline.ids), torch.from_numpy(baseline.kept)
    first = torch.from_numpy(baseline.first)
    logprobs = torch.empty(len(windows), windows.shape[1] - 1)
    kl, agrees = torch.empty_like(logprobs), torch.empty(logprobs.shape, dtype=torch.bool)
    with subject.watch_routers() as routes:
        for place, scores, following in _chunks(subject, windows, progress):
            total = scores.logsumexp(-1, keepdim=True)
            logprobs[place] = (scores.gather(-1, following) - total).squeeze(-1).cpu()
            ours = scores.gather(-1, kept_ids[place].long().to(scores.device)) - total
            kl[place] = divergence(kept[place].to(scores.device), ours).cpu()
            agrees[place] = scores.argmax(-1).cpu() == first[place]
    routed = _same(routes, windows, baseline.experts)
    return QuantizedText(logprobs.numpy(), kl.numpy(), agrees.numpy(), routed=routed)


def _of_likeliest(said: TopLogprobs, baseline: BaselineText) -> QuantizedText:
    """The same from the likeliest tokens of both."""
    assert baseline.ids is not None
    assert baseline.kept is not None
    rows = zip(baseline.ids, baseline.kept, said.ids, said.kept, strict=True)
    found = [likeliest.divergence(*row) for row in rows]
    value, low, high = (
        np.stack([getattr(each, name) for each in found]).astype(np.float32)
        for name in ("value", "low", "high")
    )
    agrees = said.ids[..., 0] == baseline.first
    return QuantizedText(said.logprobs, value, agrees, (low, high))


def _same(
    routes: Routes, windows: NDArray[np.int64], experts: NDArray[np.int32] | None
) -> dict[int, NDArray[np.bool_]]:
    """By decoder layer, whether a token's experts are those of the baseline, [n, length]."""
    ours = routes.table(windows)
    if ours is None or experts is None or ours.shape != experts.shape:
        return {}
    return dict(zip(routes.layers, (ours == experts).all(-1), strict=True))


def divergence(base: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KL in nats from both models' log-probabilities [..., TOP + TAIL] of the kept tokens."""
    gaps = base - ours
    first, drawn = gaps[..., :TOP], gaps[..., TOP:]
    chance = base[..., :TOP].exp()
    kl = (chance * first).sum(-1)
    if base.shape[-1] > TOP:
        mass = (1 - chance.sum(-1)).clamp_min(0)
        kl += mass * (drawn.mean(-1) + _control(first, drawn, mass, ours))
    return kl


def _control(
    first: torch.Tensor, drawn: torch.Tensor, mass: torch.Tensor, ours: torch.Tensor
) -> torch.Tensor:
    """The control variate of the module's docstring, of mean 0, [...]; `mass` is r.

    Its weight is the best one where gaps are normal: v / (exp(v) - 1), v being their variance.
    """
    import torch

    other = (1 - ours[..., :TOP].exp().sum(-1)).clamp_min(0)
    spread = first.var(-1)
    weight = torch.where(spread > 1e-6, spread / spread.expm1(), 1.0)
    off = ((-drawn).exp().mean(-1) * mass / other) - 1
    sound = (mass > LEAST_MASS) & (other > LEAST_MASS) & weight.isfinite() & off.isfinite()
    return torch.where(sound, weight * off, 0.0)


def keep(logprobs: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    """Of log-probabilities [rows, vocabulary] the ids [rows, kept] of the module's docstring."""
    import torch

    top = logprobs.topk(min(TOP, logprobs.shape[-1]), sorted=False).indices
    if logprobs.shape[-1] <= TOP:
        return top
    rest = logprobs.exp().scatter_(-1, top, 0.0)
    rest += torch.finfo(rest.dtype).tiny  # a distribution that the top exhausts has no other token
    drawn = torch.multinomial(rest, TAIL, replacement=True, generator=dice)
    return torch.cat((top, drawn), dim=-1)


def _chunks(
    subject: WithLogits, windows: NDArray[np.int64], progress: Progress | None
) -> Iterator[tuple[tuple[int, slice], torch.Tensor, torch.Tensor]]:
    """(Window, positions) with the float32 logits [positions, vocabulary] of these predictions and
    the ids [positions, 1] that follow."""
    import torch

    for rows, logits in subject.logits(windows):
        following = torch.from_numpy(windows[rows, 1:]).to(logits.device)
        for row in range(rows.stop - rows.start):
            for start in range(0, windows.shape[1] - 1, CHUNK):
                at = slice(start, min(start + CHUNK, windows.shape[1] - 1))
                scores = logits[row, at].float()
                yield (rows.start + row, at), scores, following[row, at].unsqueeze(-1)
        if progress:
            progress(rows.stop, len(windows))
