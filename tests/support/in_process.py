"""Quantization libraries in this process: a job takes a second, not the twenty of a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import AutoConfig, conversion_mapping, modeling_utils

from quantkit.backends.process.job import Job, JobInputError, Result, Unit
from quantkit.errors import InputError
from quantkit.pipeline import process

CALIBRATION = "sources:\n  - {type: stdlib, part: topics}\n"
"""A mixture of texts that needs no package."""


class Quiet:
    """A reporter that tells nobody."""

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        """Nothing."""

    def advance(self, done: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def in_this_process(job: Job, *, log: Path, work: Path | None = None, **_: Any) -> Result:
    """What `run_worker` does, without the twenty seconds that a library takes to start."""
    result = Result()
    log.write_text("")
    module, run = job.adapter.split(":")
    try:
        with chdir(work or log.parent), as_it_was(job.model):  # GPTQModel leaves a log there
            getattr(import_module(module), run)(job, Quiet(), result)
    except JobInputError as error:
        raise InputError(error.message, hint=error.hint, code=error.code) from error
    return result


@contextmanager
def as_it_was(model: str) -> Iterator[None]:
    """GPTQModel puts classes of its own into Transformers, and its tokenizers the hub's cache into
    the environment: the others find what was there."""
    family = type(AutoConfig.from_pretrained(model)).__module__
    modeling = import_module(family.replace("configuration_", "modeling_"))
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        for module in (modeling, conversion_mapping, modeling_utils):
            for name, value in list(vars(module).items()):
                if isinstance(value, type) or name == "get_checkpoint_conversion_mapping":
                    patch.setattr(module, name, value)
        yield


@contextmanager
def without_workers() -> Iterator[None]:
    """Every library's job runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "run_worker", in_this_process)
        yield
