"""How far a long work is, told while it goes on: the callbacks that everything takes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Takes the steps done and the steps in all."""

BytesDone = Callable[[int], None]
"""Takes the source bytes done."""
