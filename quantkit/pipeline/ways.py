"""How a backend runs, and the one place that tells the two ways apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from quantkit.backends.process.job import Reporter
from quantkit.backends.registry import Backend
from quantkit.backends.registry.backend import Way as Name
from quantkit.checkpoint.directory import Checkpoint
from quantkit.pipeline import process, stream
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.request import Outcome, Request


class Way(Protocol):
    """From a plan to a published checkpoint; a module of this package."""

    def check(self, source: Checkpoint, plan: Plan) -> None:
        """Refuse what the plan and the headers tell, before any work, as `quantkit plan` does."""

    def run(self, request: Request, source: Checkpoint, plan: Plan, ui: Reporter) -> Outcome:
        """Quantize, seal, verify and publish; `request.out` is free and apart from the source."""


WAYS: Mapping[Name, Way] = {"process": process, "streaming": stream}


def way_of(backend: Backend) -> Way:
    """How that backend runs."""
    return WAYS[backend.way]
