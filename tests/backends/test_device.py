"""Which device `auto` is, on machines that this one is not."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from quantkit.backends.environments import device
from quantkit.backends.environments.device import amd_note, resolve_device, torch_build
from quantkit.backends.environments.room import absent_gpus, device_room
from quantkit.runtime.linear.kernels.base import no_gpu

VERSION = """from typing import Optional
__version__ = '2.13.0'
cuda: Optional[str] = {cuda}
git_version = 'cuda'
hip: Optional[str] = {hip}
"""
Machine = Callable[..., None]
BUILDS = {
    "cuda": VERSION.format(cuda="'13.0'", hip="None"),
    "hip": VERSION.format(cuda="None", hip="'7.1.25424'"),
    "cpu": VERSION.format(cuda="None", hip="None"),
    "old hip": "cuda = None\nhip = '5.7'\n",
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A function that makes this a machine with such GPUs and such a torch."""

    def make(build: str, *gpus: str) -> None:
        (tmp_path / "version.py").write_text(BUILDS[build])
        spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(device, "find_spec", lambda _: spec)
        monkeypatch.setattr(device, "has_nvidia_gpu", lambda: "nvidia" in gpus)
        monkeypatch.setattr(device, "has_amd_gpu", lambda: "amd" in gpus)
        for name in device._AMD_MASKS:
            monkeypatch.delenv(name, raising=False)

    return make


@pytest.mark.parametrize(
    ("build", "gpus", "found"),
    [
        ("hip", ("amd",), "cuda"),
        ("old hip", ("amd",), "cuda"),
        ("cuda", ("nvidia",), "cuda"),
        ("cuda", ("amd",), "cpu"),
        ("cpu", ("amd",), "cpu"),
        ("cpu", ("nvidia",), "cpu"),
        ("hip", ("nvidia",), "cpu"),
        ("hip", (), "cpu"),
        ("cuda", ("amd", "nvidia"), "cuda"),
    ],
)
def test_auto_is_the_gpu_that_this_torch_is_built_for(
    build: str, gpus: tuple[str, ...], found: str, machine: Machine
) -> None:
    machine(build, *gpus)
    assert resolve_device("auto") == found


@pytest.mark.parametrize("mask", device._AMD_MASKS)
def test_a_hidden_amd_gpu_is_not_taken(
    mask: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("hip", "amd")
    monkeypatch.setenv(mask, "")
    assert resolve_device("auto") == "cpu"


def test_a_gpu_is_counted_among_the_visible_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the driver's program, as there is no GPU here."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0, 1000\\n1, 2000\\n2, 3000\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_room("cuda:1") == 2000 << 20
    assert device_room("cuda") == 1000 << 20
    assert device_room("npu:0") is None
    assert absent_gpus(("cuda:0", "cuda:2", "cuda:3")) == ["cuda:3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert device_room("cuda") == 3000 << 20
    assert device_room("cuda:2") is None
    assert absent_gpus(("cuda:1", "cuda:2")) == ["cuda:2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6b")
    assert device_room("cuda") is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device_room("cuda") is None


def test_a_job_without_gpus_starts_no_program_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho > {tmp_path / 'started'}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert absent_gpus(("cpu",)) == []
    assert not (tmp_path / "started").exists()
    absent_gpus(("cuda:0",))
    assert (tmp_path / "started").exists()


def test_what_works_on_amd_is_said(machine: Machine) -> None:
    machine("hip", "amd")
    assert "plain PyTorch" in str(amd_note())
    machine("cpu", "amd")
    assert "not built for ROCm" in str(amd_note())
    machine("cuda", "nvidia")
    assert amd_note() is None


def test_kernels_for_nvidia_do_not_take_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its (9, 4) of an MI300X would pass for a Hopper."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert "ROCm" in str(no_gpu(torch.device("cuda")))
    monkeypatch.setattr(torch.version, "hip", None)
    assert no_gpu(torch.device("cuda"), (9, 0)) is None


def test_this_torch_is_what_it_says() -> None:
    expected = "hip" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    assert torch_build() == expected
