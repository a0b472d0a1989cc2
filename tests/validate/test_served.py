"""An engine as a subject, as far as it is known without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.runtime.serving.environments import ENGINES
from quantkit.validation.subjects.served import Served

HOPPER = {"MarlinNvFp4LinearKernel": 12}
"""What vLLM takes for NVFP4 where there is no kernel for 4-bit activations."""


@pytest.mark.parametrize(
    ("name", "kernels", "told"),
    [
        ("llmcompressor/nvfp4", HOPPER, True),
        ("llmcompressor/nvfp4", {"FlashInferNvFp4LinearKernel": 12}, False),
        ("llmcompressor/w4a16", {"MarlinLinearKernel": 12}, False),
        ("llmcompressor/source", {}, False),
    ],
)
def test_what_the_engine_computes_is_what_it_serves(
    name: str, kernels: dict[str, int], told: bool, artifact: Callable[[str], Path]
) -> None:
    process: Any = SimpleNamespace(engine=ENGINES["vllm"], version="0", kernels=kernels)
    order: Any = SimpleNamespace()
    subject = Served(open_checkpoint(artifact(name)), process, order)
    assert not subject.weights_only
    said = "vLLM leaves activations in 16 bit on this GPU: MarlinNvFp4LinearKernel"
    assert list(subject.notes) == [said] * told
