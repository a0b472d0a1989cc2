"""Shared fixtures: the real demo model, and a copy cut to three layers."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.artifacts import artifacts
from tests.support.cli import METHODS, QUICK, quantkit
from tests.support.helpers import cut_layers

os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads starve the other processes
os.environ["QUANTKIT_VLLM_OPERATORS"] = "off"  # their environment may appear while tests run
os.environ.setdefault("QUANTKIT_CACHE", str(Path(__file__).parent.parent / ".cache"))
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background: children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

LIBRARY_FIXTURES = {"outputs", "artifact"}
ENGINE_FIXTURES = {"vllm_python"}


gc.disable()  # what collection imports is no garbage: a seventh of its time


def pytest_collection_finish() -> None:
    """What collection imported stays: no later search for garbage goes through it again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for what a library made, or for an engine, is marked as one."""
    for item in items:
        asked = set(getattr(item, "fixturenames", ()))
        if asked & LIBRARY_FIXTURES:
            item.add_marker(pytest.mark.library)
        if asked & ENGINE_FIXTURES:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M in BF16, 30 layers (converted once, then cached)."""
    from quantkit.checkpoint.demo import demo_model as build

    return build()


@pytest.fixture(scope="session")
def small_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three layers of the demo model: real weights, seconds instead of minutes."""
    return cut_layers(demo_model, tmp_path_factory.mktemp("models") / "small", 3)


@pytest.fixture(scope="session")
def outputs(
    small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Method of `tests.support.cli.METHODS` → the checkpoint it made and the state file it
    saved."""
    made = {}
    root = tmp_path_factory.mktemp("outputs")
    for method, more in METHODS.items():
        out, state = root / method, root / f"{method}.pth"
        run = quantkit(
            "quantize", small_model, "--method", method, "--out", out,
            "--checkpoint-save", state, "--json", *QUICK, *more,
        )  # fmt: skip
        assert run.code == 0, run.err
        assert run.document["verify"]["ok"]
        made[method] = (out, state)
    return made


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of the managed vLLM environment, made once in the cache (about 90 s)."""
    from quantkit.backends.environments.managed import create, spec_named

    return create(spec_named("vllm"), None, print)


@pytest.fixture
def operators(vllm_python: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's CPU operators, loaded; skips where the runtime does not take them."""
    import torch

    from quantkit.runtime.vllm_ops import cpu as vllm_operators

    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("the runtime takes vLLM's operators on CPUs with AVX-512 only")

    assert vllm_python.is_file()
    monkeypatch.delenv(vllm_operators.SWITCH)
    vllm_operators.missing.cache_clear()
    yield
    vllm_operators.missing.cache_clear()


@pytest.fixture(scope="session")
def artifact(small_model: Path) -> Callable[[str], Path]:
    """ "LIBRARY/NAME" → a checkpoint that the library itself wrote (see
    `tests.support.artifacts`)."""

    def get(name: str) -> Path:
        library, _, checkpoint = name.partition("/")
        return artifacts(library, small_model) / checkpoint

    return get


@pytest.fixture(scope="session")
def checkpoints(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """8 and 4 bits, symmetric and with zero points."""
    from quantkit.checkpoint.schemes import SCHEMES
    from tests.support.rtn import rtn

    root = tmp_path_factory.mktemp("checkpoints")
    grouped = {
        bits: SCHEMES[f"w{bits}a16"].with_weight(granularity="group", group_size=64)
        for bits in (8, 4)
    }
    asymmetric = {bits: scheme.with_weight(symmetric=False) for bits, scheme in grouped.items()}
    return {
        "8": rtn(small_model, root / "w8a8", SCHEMES["w8a8_dynamic"]),
        "4": rtn(small_model, root / "w4a16", grouped[4]),
        "8 asymmetric": rtn(small_model, root / "w8a16", asymmetric[8]),
        "4 asymmetric": rtn(small_model, root / "w4a16_asym", asymmetric[4]),
    }


@pytest.fixture(scope="session")
def sealed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of our own, with quantkit.json and card."""
    out = tmp_path_factory.mktemp("sealed") / "w8a8"
    run = quantkit("quantize", small_model, "--method", "rtn_w8a8_dynamic", "--out", out)
    assert run.code == 0, run.err
    return out
