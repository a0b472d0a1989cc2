"""The reference arm: the baseline rounded to nearest in the checkpoint's own formats.

It says what a format costs without any tuning, whatever the size of the model, and is kept beside
the baseline's answers under which layers are rounded, how, and by which kernel.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from quantkit.backends.process.job import Reporter
from quantkit.checkpoint.directory import Checkpoint
from quantkit.errors import InputError
from quantkit.formats.quantized import examine
from quantkit.formats.registry import detect
from quantkit.validation.ask import pictures
from quantkit.validation.ask import text as texts
from quantkit.validation.ask.cachefile import BaselineCache
from quantkit.validation.ask.pictures import BaselinePictures, QuantizedPictures
from quantkit.validation.ask.questions import BaselineAnswers, Lazy, Questions
from quantkit.validation.ask.text import QuantizedText
from quantkit.validation.preflight import Candidate
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import open_rounded

NAME, NAME_OF_PICTURES = "rounded", "rounded-pictures"
"""What its answers are called in the cache."""


@dataclass(frozen=True)
class RoundedAnswers:
    """What the rounded baseline says of the text, and of the pictures, where there are any."""

    text: QuantizedText
    pictures: QuantizedPictures | None


def ask_reference(
    candidate: Candidate,
    engine: str,
    opening: Opening,
    questions: Questions,
    baseline: BaselineAnswers,
    cache: BaselineCache,
    ui: Reporter,
) -> RoundedAnswers | str:
    """The answers of the rounded baseline, from the cache where that holds them; in words, why it
    cannot be asked."""
    if engine != "builtin":
        return f"{engine} cannot hold the baseline rounded to nearest"
    if not isinstance(candidate.held, Checkpoint):
        return "the types of GGUF files are not rounded here"
    windows, shown = questions.text.windows, questions.pictures.prompts
    rounded = Lazy(lambda: open_rounded(candidate.baseline.path, candidate.path, opening))

    def read() -> dict[str, Any]:
        subject = rounded.subject
        ui.stage("rounded to nearest: text", len(windows))
        found = texts.measure_quantized(subject, windows, baseline.text, on)
        return {key: value for key, value in vars(found).items() if key not in ("routed", "bounds")}

    def look() -> dict[str, Any]:
        subject = rounded.subject
        ui.stage("rounded to nearest: pictures", len(shown))
        assert isinstance(baseline.pictures, BaselinePictures)
        found = pictures.measure_quantized(subject, shown, baseline.pictures, on)
        return {key: value for key, value in vars(found).items() if key != "errors"}

    def on(done: int, _total: int) -> None:
        ui.advance(done)

    try:
        asked = _asked(candidate.held, opening, questions)
        if not isinstance(baseline.pictures, BaselinePictures):
            asked.pop(NAME_OF_PICTURES, None)
        found = {
            name: cache.arrays(name, asked[name], make)
            for name, make in ((NAME, read), (NAME_OF_PICTURES, look))
            if name in asked
        }
    except InputError as error:
        return f"the baseline cannot be rounded as the checkpoint is: {error.message}"
    finally:
        rounded.close()
    seen = found.get(NAME_OF_PICTURES)
    return RoundedAnswers(QuantizedText(**found[NAME]), QuantizedPictures(**seen) if seen else None)


def unknown(
    candidate: Candidate,
    engine: str,
    opening: Opening,
    questions: Questions,
    cache: BaselineCache,
) -> bool:
    """Whether the rounded baseline will have to be run."""
    if engine != "builtin" or not isinstance(candidate.held, Checkpoint):
        return False
    asked = _asked(candidate.held, opening, questions)
    return not all(cache.holds(*question) for question in asked.items())


def _asked(held: Checkpoint, opening: Opening, questions: Questions) -> dict[str, str]:
    """What is asked → a digest of what is rounded, how, and who computes it on which text or
    pictures."""
    from quantkit.runtime.loading.rounded import digest

    declared = examine(held, detect(held)).declaration
    # on a GPU the layout tells which activations the engine rounds
    how = [digest(declared.layers), declared.quant_method, opening.kernel, opening.as_on]
    of = {NAME: questions.text.digest}
    if questions.pictures.prompts:
        of[NAME_OF_PICTURES] = questions.pictures.digest
    return {
        name: hashlib.sha256(json.dumps([what, *how]).encode()).hexdigest()
        for name, what in of.items()
    }
