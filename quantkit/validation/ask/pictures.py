"""What a model says after it has seen a picture: KL and top-1 agreement of the words that follow.

Every word after the picture counts, of the question too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantkit.backends.process.job import Reporter
from quantkit.checkpoint.progress import Progress
from quantkit.validation.ask.kvcache import WithCache
from quantkit.validation.ask.picture_prompts import PicturePrompt
from quantkit.validation.ask.text import divergence, keep
from quantkit.validation.subjects.base import Subject

if TYPE_CHECKING:
    import torch

    Shown = tuple[torch.Tensor, torch.Tensor | None]


class CannotLookError(ValueError):
    """A model does not take what its processor makes of a picture."""


@runtime_checkable
class WithPictures(Protocol):
    """A subject that shows its model pictures."""

    def show(
        self, ids: Sequence[int], inputs: Mapping[str, NDArray[Any]], last: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [last, vocabulary] of the last positions of a conversation, and a sketch of the
        embeddings of all [n, columns]; `inputs` are what a processor made of its picture."""
        ...


@dataclass(frozen=True)
class BaselinePictures:
    """The baseline on all words of all conversations, one after the other [t].

    first: int64, the likeliest token. ids, kept: tokens and their log-probabilities
    [t, TOP + TAIL], as of a text. embeddings: a sketch of those up to the first word of each
    conversation, one after the other; None of a family that does not show them.
    """

    first: NDArray[np.int64]
    ids: NDArray[np.int32]
    kept: NDArray[np.float32]
    embeddings: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class QuantizedPictures:
    """The quantized model on the same words [t]: `kl` in nats, `agrees` (same first token); and of
    each picture the relative error of the embeddings up to the first word."""

    kl: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    errors: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class PictureAnswers:
    """`served`: what the quantized model says. weights: the same with its key-value cache in 16
    bit, where it is quantized."""

    served: QuantizedPictures
    weights: QuantizedPictures


def measure_baseline(
    subject: Subject, prompts: Sequence[PicturePrompt], progress: Progress | None
) -> BaselinePictures:
    """Show the baseline the pictures; CannotLookError where its forward pass refuses what its
    processor makes."""
    import torch

    first, ids, kept, embeddings = [], [], [], []
    dice: torch.Generator | None = None
    for scores, before in _refusing(_shown(subject, prompts, progress)):
        if dice is None:
            dice = torch.Generator(scores.device).manual_seed(0)
        likely = scores.log_softmax(-1)
        chosen = keep(likely, dice)
        first.append(likely.argmax(-1).cpu())
        ids.append(chosen.to(torch.int32).cpu())
        kept.append(likely.gather(-1, chosen).cpu())
        if before is not None:
            embeddings.append(before)
    return BaselinePictures(
        torch.cat(first).numpy(),
        torch.cat(ids).numpy(),
        torch.cat(kept).numpy(),
        torch.cat(embeddings).numpy() if embeddings else None,
    )


def _refusing(shown: Iterator[Shown]) -> Iterator[Shown]:
    try:
        yield from shown
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        told = " ".join(str(e).split())[:200]
        if "allocate" in told:
            raise
        raise CannotLookError(f"the baseline cannot look at pictures: {told}") from e


def measure_quantized(
    subject: Subject,
    prompts: Sequence[PicturePrompt],
    baseline: BaselinePictures,
    progress: Progress | None,
) -> QuantizedPictures:
    """Show the quantized model the pictures, against what the baseline said of them."""
    import torch

    kl, agrees, errors, at, place = [], [], [], slice(0), slice(0)
    for scores, before in _shown(subject, prompts, progress):
        at = slice(at.stop, at.stop + len(scores))
        ids = torch.from_numpy(baseline.ids[at]).long().to(scores.device)
        kept = torch.from_numpy(baseline.kept[at]).to(scores.device)
        kl.append(divergence(kept, scores.log_softmax(-1).gather(-1, ids)).cpu())
        agrees.append(scores.argmax(-1).cpu() == torch.from_numpy(baseline.first[at]))
        if before is not None and baseline.embeddings is not None:
            place = slice(place.stop, place.stop + len(before))
            errors.append(_relative_error(before.numpy(), baseline.embeddings[place]))
    return QuantizedPictures(
        torch.cat(kl).numpy(), torch.cat(agrees).numpy(), np.array(errors) if errors else None
    )


def _relative_error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def ask_pictures(
    subject: Subject,
    prompts: Sequence[PicturePrompt],
    baseline: BaselinePictures | str | None,
    ui: Reporter,
) -> PictureAnswers | None:
    """The answers of a quantized model; None where no pictures are shown."""
    if not isinstance(baseline, BaselinePictures):
        return None
    ui.stage("quantized: pictures", len(prompts))
    served = measure_quantized(subject, prompts, baseline, lambda done, _: ui.advance(done))
    if not isinstance(subject, WithCache) or not subject.cache_scales:
        return PictureAnswers(served, served)
    with subject.cache_in_16_bit():
        return PictureAnswers(served, measure_quantized(subject, prompts, baseline, None))


def _shown(
    subject: Subject, prompts: Sequence[PicturePrompt], progress: Progress | None
) -> Iterator[Shown]:
    """Of each conversation the float32 logits [words, vocabulary] of its words, and the sketch of
    what comes before them."""
    assert isinstance(subject, WithPictures)
    for number, prompt in enumerate(prompts, 1):
        logits, sketch = subject.show(prompt.ids, prompt.inputs, prompt.words + 1)
        yield logits[:-1].float(), None if sketch is None else sketch[: -prompt.words]
        if progress:
            progress(number, len(prompts))
