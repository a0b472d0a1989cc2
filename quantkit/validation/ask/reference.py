"""The reference arm: the baseline rounded to nearest in the checkpoint's own formats, on the text.

It says what a format costs without any tuning, whatever the size of the model, and is kept beside
the baseline's answers under which layers are rounded, how, and by which kernel.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from quantkit.backends.process.job import Reporter
from quantkit.checkpoint.directory import Checkpoint
from quantkit.errors import InputError
from quantkit.formats.quantized import examine
from quantkit.formats.registry import detect
from quantkit.validation.ask import text as texts
from quantkit.validation.ask.cachefile import BaselineCache
from quantkit.validation.ask.data import EvalText
from quantkit.validation.ask.text import BaselineText, QuantizedText
from quantkit.validation.preflight import Candidate
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import open_rounded

NAME = "rounded"
"""What its answers are called in the cache."""


def ask_reference(
    candidate: Candidate,
    engine: str,
    opening: Opening,
    text: EvalText,
    baseline: BaselineText,
    cache: BaselineCache,
    ui: Reporter,
) -> QuantizedText | str:
    """What the rounded baseline says of the text, from the cache where that holds it; in words, why
    it cannot be asked."""
    if engine != "builtin":
        return f"{engine} cannot hold the baseline rounded to nearest"
    if not isinstance(candidate.held, Checkpoint):
        return "the types of GGUF files are not rounded here"

    def make() -> dict[str, Any]:
        subject = open_rounded(candidate.baseline.path, candidate.path, opening)
        try:
            ui.stage("rounded to nearest: text", len(text.windows))
            found = texts.measure_quantized(
                subject, text.windows, baseline, lambda done, _: ui.advance(done)
            )
        finally:
            subject.close()
        return {key: value for key, value in vars(found).items() if key != "routed"}

    try:
        found = cache.arrays(NAME, _question(candidate.held, opening, text), make)
    except InputError as error:
        return f"the baseline cannot be rounded as the checkpoint is: {error.message}"
    return QuantizedText(**found)


def unknown(
    candidate: Candidate, engine: str, opening: Opening, text: EvalText, cache: BaselineCache
) -> bool:
    """Whether the rounded baseline will have to be run."""
    if engine != "builtin" or not isinstance(candidate.held, Checkpoint):
        return False
    return not cache.holds(NAME, _question(candidate.held, opening, text))


def _question(held: Checkpoint, opening: Opening, text: EvalText) -> str:
    """A digest of what is rounded, how, and who computes it on which text."""
    from quantkit.runtime.loading.rounded import digest

    declared = examine(held, detect(held)).declaration
    # on a GPU the layout tells which activations the engine rounds
    stated = [text.digest, digest(declared.layers), declared.quant_method, opening.kernel,
              opening.as_on]  # fmt: skip
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()
