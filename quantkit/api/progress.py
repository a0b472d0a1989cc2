"""What the functions of the API tell while they work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from quantkit.checkpoint.progress import Progress


@dataclass(frozen=True)
class ProgressEvent:
    """What a progress callback is told: a stage begins, it advances, or there is a note.

    `done` of `total` steps or bytes of the stage are finished (total 0: unknown). `note` is
    something to know, which quantkit.json keeps too; empty but for the kind "note".
    """

    kind: Literal["stage", "advance", "note"]
    stage: str
    done: int = 0
    total: int = 0
    unit: Literal["steps", "bytes"] = "steps"
    note: str = ""


ProgressCallback = Callable[[ProgressEvent], object]


class Told:
    """The Reporter of the pipeline that tells one callback."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._tell = callback or (lambda _event: None)
        self._at = ProgressEvent("stage", "")

    def stage(self, name: str, total: int = 0, unit: Literal["steps", "bytes"] = "steps") -> None:
        self._at = ProgressEvent("stage", name, 0, total, unit)
        self._tell(self._at)

    def advance(self, done: int) -> None:
        self._at = replace(self._at, kind="advance", done=done)
        self._tell(self._at)

    def note(self, text: str) -> None:
        self._tell(replace(self._at, kind="note", note=text))

    def steps(self, name: str) -> Progress:
        """What hears (done, total), and begins the stage when it first does."""

        def advance(done: int, total: int) -> None:
            if self._at.stage != name:
                self.stage(name, total)
            self.advance(done)

        return advance
