"""An engine as a subject, as far as it is known without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.backends.environments import room
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.runtime.serving.environments import ENGINES
from quantkit.runtime.serving.launch import launch
from quantkit.validation.memory import available_bytes, refuse_too_large
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.served import Served, engine_order, refuse_served

TWO = Opening("cuda:0,1")
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


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A driver that tells of so many GPUs with 1 GB each, as there is none here."""

    def set_gpus(count: int) -> None:
        monkeypatch.setattr(room, "gpu_rooms", lambda: dict.fromkeys(range(count), 10**9))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return set_gpus


@pytest.mark.parametrize(
    ("name", "argument", "made"),
    [
        ("vllm", "tensor_parallel_size", "llmcompressor/source"),
        ("vllm", "tensor_parallel_size", "llmcompressor/w4a16"),
        ("sglang", "tp_size", "llmcompressor/source"),  # the other's names are vLLM's alone
    ],
)
def test_an_engine_is_told_over_how_many_gpus(
    name: str, argument: str, made: str, artifact: Callable[[str], Path]
) -> None:
    """As the flags of its server are, by the names of its Python interface."""
    path, engine = artifact(made), ENGINES[name]
    order = engine_order(path, engine, Opening("cuda:0,1,2"))
    assert (order.device, order.arguments[argument]) == ("cuda:0,1,2", 3)
    flag = f"--{argument.replace('_', '-')}"
    assert launch(path, name, 3).argv[-2:] == (flag, "3")
    assert argument not in engine_order(path, engine, Opening("cuda:1")).arguments


def test_what_does_not_divide_is_refused_before_an_engine_starts(
    gpus: Callable[[int], None], artifact: Callable[[str], Path]
) -> None:
    gpus(2)
    for made in ("llmcompressor/source", "llmcompressor/w4a16"):
        with pytest.raises(InputError, match="cannot share 9 attention heads") as caught:
            refuse_served(ENGINES["vllm"], artifact(made), TWO)
        assert caught.value.code == "launch.will_not_load"


def test_a_gpu_that_is_not_here_is_named(
    gpus: Callable[[int], None], artifact: Callable[[str], Path]
) -> None:
    gpus(1)
    source = artifact("llmcompressor/source")
    with pytest.raises(InputError, match=r"^cuda:1 of --device cuda:0,1 cannot be had"):
        refuse_served(ENGINES["transformers"], source, TWO)
    gpus(2)
    refuse_served(ENGINES["transformers"], source, TWO)


def test_the_least_room_counts_for_each_of_several_gpus(gpus: Callable[[int], None]) -> None:
    gpus(2)
    assert available_bytes("cuda:0,1") == 2 * 10**9
    with pytest.raises(InputError, match=r"3\.0 GB on cuda:0,1, where 2\.0 GB are free"):
        refuse_too_large("It", 3 * 10**9, "cuda:0,1")
