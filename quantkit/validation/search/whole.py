"""The mean KL divergence of the whole model under a recipe, measured on a checkpoint made by it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.backends.process.job import Reporter
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.whole_files import remove
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.request import Request
from quantkit.recipe.model import Recipe
from quantkit.validation.ask.text import BaselineText, measure_baseline, measure_quantized
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import open_builtin


class Whole:
    """Measures recipes on one model and text; trials are made in `work` and removed."""

    def __init__(
        self,
        model: str,
        source: Checkpoint,
        windows: NDArray[np.int64],
        work: Path,
        device: str,
        ui: Reporter,
    ) -> None:
        self._model, self._source, self._windows = model, source, windows
        self._work, self._device, self._ui = work, device, ui
        self._tried = 0

    @cached_property
    def _baseline(self) -> BaselineText:
        subject = open_builtin(self._source.path, Opening(self._device))
        self._ui.stage("baseline", len(self._windows))
        try:
            progress = lambda done, _total: self._ui.advance(done)  # noqa: E731
            return measure_baseline(subject, self._windows, progress)
        finally:
            subject.close()

    def measure(self, recipe: Recipe) -> tuple[float, int]:
        """KL in nats a token, and the bytes of the checkpoint's weights.

        Raises as `quantize` does.
        """
        baseline = self._baseline
        self._tried += 1
        out = self._work / f"trial-{self._tried}"
        self._work.mkdir(parents=True, exist_ok=True)
        quantize(Request(self._model, recipe, out, device=self._device), self._ui)
        try:
            subject = open_builtin(out, Opening(self._device))
            self._ui.stage(f"measure trial {self._tried}", len(self._windows))
            progress = lambda done, _total: self._ui.advance(done)  # noqa: E731
            text = measure_quantized(subject, self._windows, baseline, progress)
            subject.close()
            size = open_checkpoint(out).weight_bytes
        finally:
            remove(out)
        assert text.kl is not None
        return float(text.kl.mean()), size
