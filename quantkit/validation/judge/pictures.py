"""The metrics of pictures: means over the words that follow each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.calibration.pictures import VERSION
from quantkit.validation.ask.picture_prompts import SEED, PicturePrompt, PicturePrompts
from quantkit.validation.ask.pictures import PictureAnswers, QuantizedPictures
from quantkit.validation.judge.bootstrap import Measured, missing, ratio, sampled

OF_PICTURES = (
    "image_kl_mean", "image_top1_agreement", "image_kl_of_rtn", "image_embedding_error",
)  # fmt: skip


def picture_metrics(
    pictures: PicturePrompts, ours: PictureAnswers, rounded: QuantizedPictures | str
) -> dict[str, Measured]:
    """KL and top-1 agreement of the words, the KL beside the baseline rounded to nearest (or why
    there is none), and the error of the embeddings, on the same pictures."""
    prompts = pictures.prompts
    found = {
        "image_kl_mean": sampled(by_picture(prompts, ours.served.kl)),
        "image_top1_agreement": sampled(by_picture(prompts, ours.served.agrees)),
        "image_embedding_error": missing("the family does not show what pictures become"),
    }
    if ours.served.errors is not None:
        found["image_embedding_error"] = sampled(ours.served.errors)
    if isinstance(rounded, str):
        return found | {"image_kl_of_rtn": missing(rounded)}
    kl, theirs = (by_picture(prompts, said.kl) for said in (ours.weights, rounded))
    return found | {"image_kl_of_rtn": ratio(kl, theirs)}


def described(pictures: PicturePrompts, ours: PictureAnswers) -> dict[str, Any]:
    """What a report keeps: which pictures, and the means over the words of each."""
    prompts = pictures.prompts
    kl, agreement = (by_picture(prompts, v) for v in (ours.served.kl, ours.served.agrees))
    return {
        "name": "drawn by quantkit",
        "seed": SEED,
        "version": VERSION,
        "digest": pictures.digest,
        "tokens": sum(prompt.words for prompt in prompts),
        "questions": [prompt.question for prompt in prompts],
        "answers": [prompt.answer for prompt in prompts],
        "kl": _listed(kl),
        "agreement": _listed(agreement),
    }


def by_picture(prompts: Sequence[PicturePrompt], values: NDArray[Any]) -> NDArray[np.float64]:
    """The mean of values [t] over the words of each conversation."""
    ends = np.cumsum([prompt.words for prompt in prompts])[:-1]
    return np.array([part.mean(dtype=np.float64) for part in np.split(values, ends)])


def _listed(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.7g}") for value in values]
